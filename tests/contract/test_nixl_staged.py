"""NIXL by way of host memory, where it can't reach a pool on a GPU; the GPU is host memory, too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import msgspec
import pytest

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.nixl import ShownBuffers
from flowkv_engine.transport.nixl_memory import ShownMemory, find_library, show_nothing
from flowkv_engine.transport.stream import Channel, Frame, Hello, Refused, Reply, Transfer
from tests.contract.cupy_on_host import host_device
from tests.contract.kv_nodes import LINK_TOKEN, NIXL, STAGED
from tests.contract.test_connectors import assert_hangs_up, assert_serves, dial, hello
from tests.contract.test_nixl import nixl
from tests.contract.test_staging import Unpinnable, staged_network
from tests.contract.unreachable_pool import library_that_fails

SENDER, RECEIVER, BOTH = STAGED
pytestmark = list(NIXL.marks)


def staging(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "is staged here" in record.message]


@pytest.mark.parametrize("kind", STAGED)
async def test_only_the_end_that_needs_it_stages(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with staged_network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        await assert_serves(receiver, sender)
    by_sender = f"nixl: KV to {receiver.address} is staged here: NIXL can't register the sender's pool"
    by_receiver = "nixl: KV of a peer is staged here: NIXL: nixlBackendError: NIXL_ERR_BACKEND"
    said = {SENDER: [by_sender], RECEIVER: [by_receiver], BOTH: [by_receiver, by_sender]}
    assert staging(caplog) == said[kind]


@pytest.mark.parametrize(
    ("num_failing", "staged"), [(0, []), (1, ["of a peer"]), (2, ["to"]), (3, ["of a peer", "to"])]
)
async def test_reads_that_fail_tell_who_has_to_stage(
    num_failing: int, staged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As where a GPU's memory can be registered, and no card can reach it."""
    caplog.set_level(logging.INFO)
    async with staged_network("nixl") as net:
        receiver, sender = await net.node(), await net.node()
        for node in (receiver, sender):
            nixl(node).device = host_device()
        nixl(receiver).library = library_that_fails(num_failing)
        await assert_serves(receiver, sender)
    words = [text.removeprefix("nixl: KV ").partition(" is staged")[0] for text in staging(caplog)]
    assert [word.replace(f" {receiver.address}", "") for word in words] == staged


@pytest.mark.parametrize("whose", [SENDER, RECEIVER])
async def test_an_end_that_can_not_stage_says_why(whose: str) -> None:
    async with staged_network(whose) as net:
        receiver, sender = await net.node(), await net.node()
        connector = nixl(sender if whose == SENDER else receiver)
        device, connector.device = connector.device, Unpinnable()
        with pytest.raises(ConnectorUnavailable, match="no memory can be pinned"):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        connector.device = device
        await assert_serves(receiver, sender)


@pytest.mark.parametrize(
    "lie", [{"num_buffers": 0}, {"buffer_bytes": 0}, {"buffer_bytes": 1 << 40}, {}], ids=str
)
async def test_buffers_that_are_not_what_a_sender_says_cost_only_its_connection(lie: dict[str, int]) -> None:
    nothing = show_nothing(find_library().version)
    async with staged_network(BOTH) as net:
        receiver, sender = await net.node(), await net.node()
        with await dial(receiver) as channel:
            await channel.send_frame(hello())
            await channel.expect_yes()
            await channel.send_frame(nothing)
            with pytest.raises(Refused, match="can't register the sender's pool"):
                await channel.expect_yes()
            sizes = {"num_buffers": 2, "buffer_bytes": 64} | lie
            await channel.send_frame(ShownBuffers(shown=nothing, **sizes))
            if not lie:
                with pytest.raises(Refused, match="can't register"):
                    await channel.expect_yes()
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


# --- beside the release before, which does not stage ------------------------------------------------


class ShownAgentBefore(Frame, frozen=True, kw_only=True, tag="ShownAgent"):
    """What the release before knows of."""

    metadata: bytes
    address: int
    device: int
    pid: int
    nonce_address: int
    nonce: bytes
    version: str


@pytest.mark.parametrize("kind", ["nixl", RECEIVER])
async def test_a_sender_of_the_release_before_is_read(kind: str) -> None:
    async with staged_network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        reserved = receiver.reserve(2)
        with contextlib.closing(ShownMemory(find_library(), sender.pool.tensor)) as memory:
            known = msgspec.structs.asdict(memory.shown)
            del known["can_stage"]
            with await dial(receiver) as channel:
                await channel.send_frame(hello())
                await channel.expect_yes()
                await channel.send_frame(ShownAgentBefore(**known))
                await channel.expect_yes()
                copies = [Copy(3, reserved.block_ids[0], 2)]
                await channel.send_frame(Transfer(transfer_id="r.1", token=reserved.token, copies=copies))
                await channel.expect_yes()
        assert receiver.block(reserved.block_ids[1]) == sender.block(4)


@pytest.mark.parametrize("kind", [RECEIVER, SENDER])
async def test_a_receiver_of_the_release_before_gets_what_it_knows(kind: str) -> None:
    """It reads a pool that it can read. To one that it can't it has no link, and hangs up."""

    async def receive(listener: socket.socket) -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        with Channel(sock, 5.0) as channel:
            await channel.receive_frame(Hello)
            await channel.send_frame(Reply())
            shown = await channel.receive_frame(ShownAgentBefore)
            await channel.send_frame(Reply(error=None if shown.metadata else "NIXL: no such agent"))
            if shown.metadata:
                await channel.wait_readable()

    async with staged_network(kind) as net:
        sender = await net.node()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(receive(listener))
                if kind == RECEIVER:
                    await (await sender.connector.connect(address, LINK_TOKEN, 24)).close()
                else:
                    with pytest.raises(ConnectorUnavailable, match="NIXL: no such agent; staged: "):
                        await sender.connector.connect(address, LINK_TOKEN, 24)
