"""What the registry costs those who watch it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from nats.js.kv import KeyValue

from flowkv_common.bus import registry
from flowkv_common.wire.messages import encode
from flowkv_common.wire.nodes import NodeDescriptor
from tests import described_nodes


class Compared:
    """A record that counts how often any is compared."""

    num = 0

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        Compared.num += 1
        return isinstance(other, Compared) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


def entry(descriptor: NodeDescriptor) -> KeyValue.Entry:
    value = encode(descriptor)
    return KeyValue.Entry("nodes", descriptor.node.node_id, value, 1, None, None, None)


async def test_a_renewed_record_is_not_compared_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node renews its record every two seconds: else that costs the square of their number."""
    monkeypatch.setattr(registry, "decode", lambda value, _: Compared(value))
    told: list[dict[str, Any]] = []
    bus: Any = SimpleNamespace(is_connected=True, connected_for_s=1e9)
    watch = registry._Watch(bus, told.append, 6.0, own_id="")
    nodes = [described_nodes.descriptor(f"n{number}", "prefill") for number in range(50)]
    for node in nodes:
        watch._hear_entry(entry(node))
    watch._tell_changes()
    assert [len(each) for each in told] == [50]
    Compared.num = 0
    for node in nodes:
        watch._hear_entry(entry(node))
        watch._tell_changes()
    assert (len(told), Compared.num) == (1, len(nodes))
    watch._hear_entry(entry(msgspec.structs.replace(nodes[7], max_prefill_tokens_per_step=77)))
    watch._tell_changes()
    assert len(told) == 2


async def test_nodes_that_were_woken_together_renew_at_different_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a thousand records come in one go every two seconds, and asks wait for that."""
    pauses: list[float] = []

    async def note_pause(_: asyncio.Event, pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 20:
            raise asyncio.CancelledError

    monkeypatch.setattr(registry, "wait_event", note_pause)
    bus: Any = SimpleNamespace(is_connected=False, on_reconnect=lambda _: lambda: None)
    with pytest.raises(asyncio.CancelledError):
        await registry.keep_announced(bus, lambda: described_nodes.descriptor("n", "prefill"), 6.0)
    assert len(set(pauses)) > 1
    assert 1.8 <= min(pauses) <= max(pauses) <= 2.0
