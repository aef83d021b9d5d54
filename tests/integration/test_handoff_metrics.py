"""Each handoff is counted once, by how it ended."""

from __future__ import annotations

import asyncio

import pytest

from flowkv_common.errors import TransferFailed
from flowkv_node.instruments import HANDOFF_RESULTS
from tests.engineless import Pair
from tests.waiting import soon, until

PROMPT = list(range(100, 110))


def counted(pair: Pair) -> dict[str, float]:
    registry = pair.p.node.instruments.registry
    labels = {"model_name": "m", "node_id": "p"}
    values = {
        result: registry.get_sample_value("flowkv_handoffs_total", {"result": result, **labels})
        for result in HANDOFF_RESULTS
    }
    assert None not in values.values()
    return {result: value for result, value in values.items() if value}


async def test_handoffs_are_counted_by_result(pair: Pair) -> None:
    assert counted(pair) == {}
    await pair.p.prefill.accept(pair.run(PROMPT))
    await pair.compute_all()
    await pair.p.wait_idle()
    assert counted(pair) == {"done": 1}

    await pair.p.prefill.accept(pair.run(PROMPT, max_tokens=1))
    await pair.compute_all()
    await pair.p.wait_idle()
    assert counted(pair) == {"done": 1, "unneeded": 1}

    run = pair.run(PROMPT)
    await pair.p.prefill.accept(run)
    await until(lambda: pair.p.node.handoffs.queue.num_holders)
    pair.p.node.attempts.cancel(f"{run.request_id}.0")
    await pair.p.wait_idle()
    assert counted(pair) == {"done": 1, "unneeded": 1, "cancelled": 1}

    pair.d.node.drain()  # it refuses to reserve
    await pair.p.prefill.accept(pair.run(PROMPT))
    await until(lambda: any(chunk.error for chunk in pair.chunks))
    await pair.p.wait_idle()
    assert counted(pair) == {"done": 1, "unneeded": 1, "cancelled": 1, "failed": 1}


async def test_a_handoff_that_is_not_needed_has_not_failed_with_a_copy_under_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, fails = asyncio.Event(), asyncio.Event()

    async def send_blocks(*_: object) -> None:
        begun.set()
        await soon(fails.wait())
        raise TransferFailed("cut")

    monkeypatch.setattr(pair.link, "send_blocks", send_blocks)
    await pair.p.prefill.accept(pair.run(PROMPT, max_tokens=1))
    await pair.compute(4)
    await soon(begun.wait())
    await pair.compute()
    await until(lambda: pair.chunks)
    fails.set()
    await pair.p.wait_idle()
    assert counted(pair) == {"unneeded": 1}
