"""What a broken or hostile peer says on a data socket is refused, and writes nothing that is not its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from flowkv_common.errors import TransferFailed
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import ConnectorUnavailable
from flowkv_engine.transport.stream import Channel, Frame, Refused, Reply, Transfer
from tests.contract.kv_nodes import LINK_TOKEN, SMALL, Network, Node, network
from tests.contract.test_connectors import GARBAGE, assert_hangs_up, assert_serves, dial, framed, hello

both_kinds = pytest.mark.parametrize("kind", ["shm", "tcp"])

DEADLINE_S = 5.0


@contextlib.asynccontextmanager
async def guarded(kind: str) -> AsyncIterator[tuple[Network, Node, Node, Reservation]]:
    """A network, a receiver, a sender, and four reserved blocks: all others must stay as they are."""
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        reserved = receiver.reserve(4)
        others = [block for block in range(24) if block not in reserved.block_ids]
        before = [receiver.block(block) for block in others]
        yield net, receiver, sender, reserved
        assert [receiver.block(block) for block in others] == before
        await assert_serves(receiver, sender)


async def greet(receiver: Node, sender: Node) -> Channel:
    """A raw connection that is ready for transfers."""
    channel = await dial(receiver)
    await channel.send_frame(hello())
    await channel.expect_yes()
    if receiver.connector.name == "shm":
        socket.send_fds(channel.sock, [b"\0"], [sender.pool.fd])
        await channel.expect_yes()
    return channel


def encoded(frame: Frame) -> bytes:
    return framed(msgspec.json.encode(frame))


def transfer(reserved: Reservation, copies: list[Copy] | None = None) -> Transfer:
    wanted = [Copy(0, reserved.block_ids[0], 4)] if copies is None else copies
    return Transfer(transfer_id="r.1", token=reserved.token, copies=wanted)


# --- a sender that does not fit ---------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("block_size", 8),
        ("num_kv_heads", 1),
        ("head_dim", 16),
        ("dtype", "float16"),
    ],
)
async def test_another_layout_is_refused_in_words(kind: str, field: str, value: object) -> None:
    async with guarded(kind) as (net, receiver, _, _):
        unlike = await net.node(msgspec.structs.replace(SMALL, **{field: value}))
        with pytest.raises(ConnectorUnavailable, match=rf"layouts differ: .*sender .*{field}={value!r}"):
            await unlike.connector.connect(receiver.address, LINK_TOKEN, 24)


# --- a sender that asks for what it may not ----------------------------------------------------------

HUGE = 1 << 62
STRAY = {
    "behind the end of the receiver": Copy(0, 23, 2),
    "before its beginning": Copy(0, -1, 2),
    "behind the end of the sender": Copy(23, 0, 2),
    "before the sender's beginning": Copy(-1, 0, 2),
    "nothing": Copy(0, 0, 0),
    "less than nothing": Copy(4, 4, -4),
    "too long to count": Copy(0, 0, HUGE),
    "far away": Copy(HUGE, HUGE, 1),
}


@both_kinds
@pytest.mark.parametrize("stray", STRAY)
async def test_copies_outside_the_pools_are_refused_by_the_receiver(kind: str, stray: str) -> None:
    async with guarded(kind) as (_, receiver, sender, reserved):
        before = bytes(receiver.pool.buffer)
        with await greet(receiver, sender) as channel:
            good = Copy(0, reserved.block_ids[0], 1)
            await channel.send_frame(transfer(reserved, [good, STRAY[stray]]))
            with pytest.raises(Refused, match="outside the pools"):
                await channel.expect_yes()
            assert bytes(receiver.pool.buffer) == before
            assert channel.is_quiet()


@both_kinds
@pytest.mark.parametrize("token", ["", "x" * 32, "\N{SNOWMAN}"])
async def test_a_guessed_token_is_refused_and_not_repeated(kind: str, token: str) -> None:
    async with guarded(kind) as (_, receiver, sender, reserved):
        before = bytes(receiver.pool.buffer)
        with await greet(receiver, sender) as channel:
            await channel.send_frame(msgspec.structs.replace(transfer(reserved), token=token))
            with pytest.raises(Refused, match="wrong token") as refusal:
                await channel.expect_yes()
            assert reserved.token not in str(refusal.value)
            assert bytes(receiver.pool.buffer) == before
            assert channel.is_quiet()


# --- a stream that ends, or doesn't ------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(
    ("kind", "cut"),
    [("shm", "greeting"), ("shm", "transfer"), ("tcp", "greeting"), ("tcp", "transfer"), ("tcp", "bytes")],
)
async def test_a_truncated_stream_leaves_the_reservation_claimable(kind: str, cut: str, share: float) -> None:
    async with guarded(kind) as (_, receiver, sender, reserved):
        said = {
            "greeting": encoded(hello()),
            "transfer": encoded(transfer(reserved)),
            "bytes": b"\1" * (4 * SMALL.block_bytes),
        }[cut]
        with await dial(receiver) if cut == "greeting" else await greet(receiver, sender) as channel:
            if cut == "bytes":
                await channel.send_frame(transfer(reserved))
                await channel.expect_yes()
            await channel.write(memoryview(said[: int(share * len(said))]))
            channel.sock.shutdown(socket.SHUT_WR)
            await assert_hangs_up(channel)
        assert receiver.reservations.claim("r.1", reserved.token) is reserved
        receiver.blocks.release(reserved.block_ids)


@both_kinds
async def test_bytes_that_nobody_announced_end_the_connection(kind: str) -> None:
    async with guarded(kind) as (_, receiver, sender, reserved):
        surplus = b"\1" * (24 * SMALL.block_bytes)
        with await greet(receiver, sender) as channel:
            await channel.send_frame(transfer(reserved))
            if kind == "tcp":
                await channel.expect_yes()
                await channel.write(memoryview(b"\1" * (4 * SMALL.block_bytes)))
            with contextlib.suppress(ConnectionError):  # it may be gone before all is written
                await channel.write(memoryview(surplus))
            with contextlib.suppress(ConnectionError):  # a reply may come first
                await channel.expect_yes()
                await assert_hangs_up(channel)


async def tcp_frozen_halfway(receiver: Node, transfer_id: str) -> Channel:
    """A raw sender that has announced two blocks and sends none."""
    reserved = receiver.reserve(2, transfer_id)
    channel = await dial(receiver, DEADLINE_S)
    await channel.send_frame(hello())
    await channel.expect_yes()
    copies = [Copy(0, reserved.block_ids[0], 2)]
    await channel.send_frame(Transfer(transfer_id=transfer_id, token=reserved.token, copies=copies))
    await channel.expect_yes()
    return channel


async def test_tcp_many_senders_that_freeze_amid_the_copy_do_not_keep_a_good_one_out() -> None:
    async with network("tcp") as net:
        receiver, sender = await net.node(num_blocks=130, io_timeout_s=4 * DEADLINE_S), await net.node()
        with contextlib.ExitStack() as frozen:
            for number in range(64):
                frozen.enter_context(await tcp_frozen_halfway(receiver, f"frozen.{number}"))
            async with asyncio.timeout(DEADLINE_S):
                await assert_serves(receiver, sender)


# --- a receiver that answers nonsense ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def rogue_receiver(kind: str, folder: Path, answers: list[bytes]) -> AsyncIterator[str]:
    """The address of one that answers the first bytes it gets with each of `answers` in turn."""
    is_path = kind == "shm"
    with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as listener:
        listener.setblocking(False)
        listener.bind(str(folder / "s") if is_path else ("127.0.0.1", 0))
        listener.listen()
        bound = listener.getsockname()
        answering = asyncio.create_task(_answer_all(listener, answers))
        try:
            yield bound if is_path else f"127.0.0.1:{bound[1]}"
        finally:
            answering.cancel()
            await asyncio.wait([answering], timeout=DEADLINE_S)


async def _answer_all(listener: socket.socket, answers: list[bytes]) -> None:
    sock, _ = await asyncio.get_running_loop().sock_accept(listener)
    with Channel(sock, DEADLINE_S) as channel:
        for answer in answers:
            await channel.wait_readable()
            sock.recv(1 << 20)
            await channel.write(memoryview(answer))
        await asyncio.get_running_loop().create_future()  # stays connected: it is cancelled in the end


# What `GARBAGE` calls another frame is just what a sender expects.
NONSENSE = {name: said for name, said in GARBAGE.items() if name != "another frame"}
NONSENSE["another frame"] = encoded(hello())


@both_kinds
@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_instead_of_a_greeting_gives_no_link(kind: str, nonsense: str, tmp_path: Path) -> None:
    async with guarded(kind) as (_, _, sender, _):
        async with rogue_receiver(kind, tmp_path, [NONSENSE[nonsense]]) as address:
            with pytest.raises(ConnectorUnavailable, match=address):
                await sender.connector.connect(address, LINK_TOKEN, 24)


@both_kinds
@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_instead_of_a_reply_fails_the_transfer(
    kind: str, nonsense: str, tmp_path: Path
) -> None:
    yes = encoded(Reply())
    greeting = [yes, yes] if kind == "shm" else [yes]
    async with guarded(kind) as (_, _, sender, _):
        async with rogue_receiver(kind, tmp_path, [*greeting, NONSENSE[nonsense]]) as address:
            link = await sender.connector.connect(address, LINK_TOKEN, 24)
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(TransferFailed, match=kind):
                    await link.send_blocks("r.1", "any", [Copy(0, 0, 1)])
