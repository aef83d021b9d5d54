"""What every KV connector keeps, and what those on sockets survive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from flowkv_common.errors import TransferFailed
from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import ConnectorUnavailable, KVLink
from flowkv_engine.transport.mapped import ShownPool
from flowkv_engine.transport.nccl import Invitation
from flowkv_engine.transport.nixl import ShownBuffers
from flowkv_engine.transport.nixl_memory import ShownAgent
from flowkv_engine.transport.sockets import dial_tcp, dial_unix, split_address
from flowkv_engine.transport.stream import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    MAX_UNAUTHENTICATED,
    Channel,
    Hello,
    Reply,
    StreamConnector,
    StreamLink,
    Transfer,
)
from flowkv_engine.transport.tls import shake_hands
from flowkv_node.links import SwitchedLink
from tests.certificates import trial_tls
from tests.contract.kv_nodes import (
    LARGE,
    LINK_TOKEN,
    NIXL,
    NIXL_STAGED,
    SMALL,
    STAGED,
    STAGED_TCP,
    Network,
    Node,
    copies_between,
    network,
)
from tests.contract.kv_sender import Job
from tests.inprocess_connector import InProcessLink
from tests.waiting import until

TLS_STAGED = pytest.param("tls, staged", marks=pytest.mark.full)
every_connector = pytest.mark.parametrize(
    "kind",
    ["inprocess", "shm", "tcp", "tls", "tcp, staged", TLS_STAGED, "cuda_ipc", "nccl", NIXL, *NIXL_STAGED],
)
on_sockets = pytest.mark.parametrize(
    "kind", ["shm", "tcp", "tls", "tcp, staged", TLS_STAGED, "cuda_ipc", "nccl", NIXL, *NIXL_STAGED]
)

BFLOAT16 = PoolLayout(num_layers=2, block_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")


async def assert_serves(receiver: Node, sender: Node, transfer_id: str = "check.1") -> None:
    """A link opened now can send a block, and its bytes arrive."""
    link = await sender.connector.connect(receiver.address, LINK_TOKEN, receiver.pool.num_blocks)
    reserved = receiver.reserve(1, transfer_id)
    await link.send_blocks(transfer_id, reserved.token, [Copy(3, reserved.block_ids[0], 1)])
    assert receiver.block(reserved.block_ids[0]) == sender.block(3)
    reserved = receiver.reservations.claim(transfer_id, reserved.token)
    receiver.blocks.release(reserved.block_ids)
    await link.close()


def num_staged(kind: str) -> int:
    """Ends that stage: each copies once more."""
    return 2 if "both" in kind or kind in STAGED_TCP else 1 if kind in STAGED else 0


def is_closed(link: KVLink) -> bool:
    assert isinstance(link, InProcessLink | StreamLink)
    return link.closed


# --- all connectors ------------------------------------------------------------------------------


@every_connector
async def test_the_right_bytes_arrive_and_nothing_else_changes(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(num_blocks=30), await net.node(num_blocks=24)
        receiver.scatter()
        sender.scatter()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 30)
        before = [receiver.block(block) for block in range(30)]
        reserved = receiver.reserve(9)
        copies = copies_between(sender, 9, reserved)
        assert len(copies) > 3

        stats = await link.send_blocks("r.1", reserved.token, copies)

        expected = dict(enumerate(before))
        for src, dst, length in copies:
            expected.update({dst + i: sender.block(src + i) for i in range(length)})
        assert [receiver.block(block) for block in range(30)] == list(expected.values())
        assert (stats.num_bytes, stats.num_copies) == (9 * SMALL.block_bytes, len(copies))
        num_sends = 1 if kind in STAGED_TCP else len(copies)
        assert stats.num_calls == num_sends + num_staged(kind) * len(copies)
        assert (link.name, is_closed(link)) == (kind.partition(",")[0].replace("tls", "tcp"), False)
        assert receiver.reservations.claim("r.1", reserved.token) is reserved


@every_connector
async def test_large_copies_arrive_whole(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(LARGE, 72), await net.node(LARGE, 72)
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 72)
        reserved = receiver.reserve(70)
        stats = await link.send_blocks("r.1", reserved.token, [Copy(1, reserved.block_ids[0], 70)])
        size = LARGE.block_bytes
        start = reserved.block_ids[0] * size
        assert receiver.pool.buffer[start : start + 70 * size] == sender.pool.buffer[size : 71 * size]
        num_sends = {"tcp": 70, "tls": 70, "nixl": 8}.get(kind, 1)
        num_sends = 70 if kind in STAGED_TCP else 9 if kind in STAGED else num_sends
        assert stats.num_calls == num_sends + 9 * num_staged(kind)


@every_connector
async def test_links_in_both_directions_and_many_transfers_at_once(kind: str) -> None:
    async with network(kind) as net:
        one, other = await net.node(), await net.node()
        links = [
            (one, other, await one.connector.connect(other.address, LINK_TOKEN, 24)),
            (other, one, await other.connector.connect(one.address, LINK_TOKEN, 24)),
        ]
        async with asyncio.TaskGroup() as tasks:
            for sender, receiver, link in links:
                sources = sender.blocks.allocate(6)
                for number, source in enumerate(sources):
                    reserved = receiver.reserve(1, f"r{number}.1")
                    copies = [Copy(source, reserved.block_ids[0], 1)]
                    tasks.create_task(link.send_blocks(f"r{number}.1", reserved.token, copies))
        assert one.reservations.num_ended == other.reservations.num_ended == 6


@every_connector
@pytest.mark.parametrize("wrong", ["token", "expired", "foreign block", "out of range", "unknown"])
async def test_what_may_not_be_written_is_refused_and_the_link_stays_good(kind: str, wrong: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        reserved = receiver.reserve(2)
        start = reserved.block_ids[0]
        copies = [Copy(0, start - (wrong == "foreign block"), 2)]
        copies = [Copy(0, 23, 2)] if wrong == "out of range" else copies
        token = "no" if wrong == "token" else reserved.token
        transfer_id = "r.2" if wrong == "unknown" else "r.1"
        if wrong == "expired":
            receiver.clock[0] += 11.0
            assert receiver.reservations.sweep() == ["r.1"]
        before = bytes(receiver.pool.buffer)
        with pytest.raises(TransferFailed):
            await link.send_blocks(transfer_id, token, copies)
        assert bytes(receiver.pool.buffer) == before

        reserved = receiver.reserve(2, "r.3")
        await link.send_blocks("r.3", reserved.token, [Copy(0, reserved.block_ids[0], 2)])
        assert receiver.block(reserved.block_ids[1]) == sender.block(1)


@every_connector
async def test_a_cancelled_send_ends_and_the_next_one_works(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(LARGE, 16), await net.node(LARGE, 16)
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 16)
        cancelled, used = receiver.reserve(8, "r.1"), receiver.reserve(8, "r.2")
        sending = asyncio.create_task(
            link.send_blocks("r.1", cancelled.token, [Copy(0, cancelled.block_ids[0], 8)])
        )
        receiver.reservations.on_enter = sending.cancel
        with pytest.raises(asyncio.CancelledError):
            await sending
        receiver.reservations.on_enter = lambda: None

        await link.send_blocks("r.2", used.token, [Copy(8, used.block_ids[0], 8)])
        for i in range(8):
            assert receiver.block(used.block_ids[i]) == sender.block(8 + i)
        async with asyncio.timeout(5):
            while receiver.reservations.num_ended < 2:
                receiver.reservations.ended.clear()
                await receiver.reservations.ended.wait()
        receiver.reservations.cancel("r.1")
        assert receiver.blocks.counts().free == 8


@every_connector
async def test_a_reservation_revoked_under_the_copy_stops_it_and_settles(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(LARGE, 16), await net.node(LARGE, 16)
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 16)
        reserved = receiver.reserve(16)
        receiver.reservations.on_enter = lambda: receiver.reservations.cancel("r.1")
        before = bytes(receiver.pool.buffer)
        with pytest.raises(TransferFailed):
            await link.send_blocks("r.1", reserved.token, [Copy(0, 0, 16)])
        assert bytes(receiver.pool.buffer) == before
        assert receiver.blocks.counts().free == 16


@every_connector
async def test_a_receiver_that_has_closed_fails_the_transfer(kind: str) -> None:
    async with network(kind) as net:
        sender, receiver = await net.node(), await net.node()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        with pytest.raises(TransferFailed):
            await link.send_blocks("r.1", "any", [Copy(0, 0, 1)])
        assert not link.is_lost  # it was refused, by a peer that is there
        await receiver.stop_serving()
        with pytest.raises(TransferFailed):
            async with asyncio.timeout(5):
                await link.send_blocks("r.1", "any", [Copy(0, 0, 1)])
        assert link.is_lost
        with pytest.raises(ConnectorUnavailable):
            await sender.connector.connect(receiver.address, LINK_TOKEN, 24)


@every_connector
async def test_peers_that_do_not_fit_get_no_link(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender, unlike = await net.node(), await net.node(), await net.node(BFLOAT16)
        with pytest.raises(ConnectorUnavailable, match=r"layouts differ: .*float32.*bfloat16"):
            await unlike.connector.connect(receiver.address, LINK_TOKEN, 24)
        with pytest.raises(ConnectorUnavailable, match="wrong link token"):
            await sender.connector.connect(receiver.address, "guessed", 24)
        with pytest.raises(ConnectorUnavailable):
            await sender.connector.connect("nowhere", LINK_TOKEN, 24)
        await assert_serves(receiver, sender)


@every_connector
async def test_a_closed_link_says_so(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        await link.close()
        await link.close()
        assert is_closed(link)
        with pytest.raises(TransferFailed, match="closed"):
            await link.send_blocks("r.1", "any", [Copy(0, 0, 1)])


@every_connector
async def test_a_link_is_replaced_under_those_who_send(kind: str) -> None:
    """Those on their way and those that wait for them end on the old one, those that come on the new one."""
    async with network(kind) as net:
        receiver, sender = await net.node(LARGE, 16), await net.node(LARGE, 16)
        old, new = [await sender.connector.connect(receiver.address, LINK_TOKEN, 16) for _ in range(2)]
        assert sender.connector.connect_timeout_s > 0
        link, has_begun = SwitchedLink(old), asyncio.Event()
        receiver.reservations.on_enter = has_begun.set

        async def send(number: int) -> None:
            reserved = receiver.reserve(4, f"r{number}.1")
            await link.send_blocks(
                f"r{number}.1", reserved.token, [Copy(4 * number, reserved.block_ids[0], 4)]
            )
            assert receiver.block(reserved.block_ids[0]) == sender.block(4 * number)

        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            for number in (0, 1):
                tasks.create_task(send(number))
            await has_begun.wait()
            switching = tasks.create_task(link.switch(new))
            await asyncio.sleep(0)
            assert not is_closed(old)
            for number in (2, 3):
                tasks.create_task(send(number))
        assert switching.done()
        assert (is_closed(old), is_closed(new)) == (True, False)
        await link.close()
        assert is_closed(new)


# --- those on sockets ----------------------------------------------------------------------------


async def dial(receiver: Node, io_timeout_s: float = 5.0) -> Channel:
    """A raw connection to the receiver, as anybody could open one."""
    if receiver.address.startswith("/"):
        return Channel(await dial_unix(receiver.address), io_timeout_s)
    [way], has_tls = split_address(receiver.address)
    sock = await dial_tcp(way)
    return Channel(await shake_hands(sock, trial_tls(), is_server=False) if has_tls else sock, io_timeout_s)


async def assert_hangs_up(channel: Channel) -> None:
    with pytest.raises(ConnectionError):
        await channel.receive_frame(Reply)


def hello(layout: PoolLayout = SMALL, num_blocks: int = 24) -> Hello:
    return Hello(token=LINK_TOKEN, layout=repr(layout), num_blocks=num_blocks)


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


GARBAGE = {
    "noise": b"GET / HTTP/1.1\r\n\r\n" * 100,
    "oversize frame": (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
    "no json": framed(b"\xff\xfe{"),
    "another frame": framed(msgspec.json.encode(Reply())),
    "a list": framed(b"[" * 5000),
    "an empty frame": framed(b""),
}


@on_sockets
@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_costs_only_its_connection(kind: str, garbage: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        with await dial(receiver) as channel:
            await channel.write(memoryview(GARBAGE[garbage]))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@on_sockets
async def test_garbage_after_the_greeting_costs_only_its_connection(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        with await dial(receiver) as channel:
            await channel.send_frame(hello())
            await channel.expect_yes()
            if kind in STAGED_TCP:
                await channel.expect_yes()
            await channel.write(memoryview(GARBAGE["noise"]))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@on_sockets
@pytest.mark.parametrize("said", [b"", b"\0\0", framed(b"x" * 20)[:12]])
async def test_a_peer_that_falls_silent_is_hung_up_on(kind: str, said: bytes) -> None:
    async with network(kind) as net:
        # Before a link is staged, NIXL registers memory.
        receiver, sender = await net.node(io_timeout_s=1.5 if kind in STAGED else 0.3), await net.node()
        with await dial(receiver) as channel:
            if said:
                await channel.write(memoryview(said))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@on_sockets
async def test_many_silent_peers_do_not_keep_a_good_one_out(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        silent = [await dial(receiver) for _ in range(50)]
        await assert_serves(receiver, sender)
        for channel in silent:
            channel.close()


@on_sockets
async def test_strangers_hold_a_bounded_number_of_places_and_lose_the_oldest_first(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(io_timeout_s=60.0), await net.node()
        with contextlib.ExitStack() as all_strangers:
            strangers = []
            for _ in range(3 * MAX_UNAUTHENTICATED):
                strangers.append(all_strangers.enter_context(await dial(receiver)))
                await strangers[-1].write(memoryview(framed(b"x" * 1000)[:500]))
            await assert_serves(receiver, sender)  # it has had a place among them for a moment
            are_there = [channel.is_quiet() for channel in strangers]
        assert are_there == [False] * (2 * MAX_UNAUTHENTICATED + 1) + [True] * (MAX_UNAUTHENTICATED - 1)


@on_sockets
async def test_a_stranger_may_not_say_more_than_hello(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(io_timeout_s=60.0), await net.node()
        with await dial(receiver) as channel:
            await channel.write(memoryview((MAX_HELLO_BYTES + 1).to_bytes(4, "big")))
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


@pytest.mark.parametrize("kind", ["shm", "tcp", "cuda_ipc", "nccl"])  # TLS needs some for its files
async def test_without_a_descriptor_left_the_oldest_stranger_gives_its_own(kind: str) -> None:
    async with network(kind) as net:
        receiver = await net.node(io_timeout_s=60.0)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        connector = receiver.connector
        assert isinstance(connector, StreamConnector)
        with await dial(receiver) as oldest, await dial(receiver) as other:
            await until(lambda: len(connector._unauthenticated) == 2)
            for _ in range(5):  # what dialling took besides is given back
                await asyncio.sleep(0)
            is_path = receiver.address.startswith("/")
            with Channel(socket.socket(socket.AF_UNIX if is_path else socket.AF_INET), 5.0) as channel:
                lowest_free = os.dup(0)
                os.close(lowest_free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
                try:
                    host, _, port = receiver.address.rpartition(":")
                    address = receiver.address if is_path else (host, int(port))
                    await asyncio.get_running_loop().sock_connect(channel.sock, address)
                    await channel.send_frame(hello())
                    await channel.expect_yes()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await assert_hangs_up(oldest)
            assert other.is_quiet()


async def test_what_is_announced_and_never_comes_takes_no_memory() -> None:
    one, other = socket.socketpair()
    with Channel(one, 60.0) as speaker, Channel(other, 60.0) as listener:
        await speaker.write(memoryview(MAX_FRAME_BYTES.to_bytes(4, "big") + b"x" * 1000))
        tracemalloc.start()
        receiving = asyncio.create_task(listener.receive_frame(Transfer))
        await until(listener.is_quiet)  # it has taken what there is
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        receiving.cancel()
        await asyncio.wait([receiving])
        assert peak < MAX_FRAME_BYTES / 4


async def greet_and_hang(listener: socket.socket, kind: str) -> Channel:
    """A receiver that says yes to one peer and then nothing any more."""
    sock, _ = await asyncio.get_running_loop().sock_accept(listener)
    channel = Channel(
        await shake_hands(sock, trial_tls(), is_server=True) if kind.startswith("tls") else sock, 5.0
    )
    await channel.receive_frame(Hello)
    await channel.send_frame(Reply())
    if kind in STAGED_TCP:
        await channel.send_frame(Reply())
    if kind == "shm":
        await channel.wait_readable()
        channel.sock.recv(1)  # with the descriptor of the pool, which is closed unseen
        await channel.send_frame(Reply())
    if kind == "cuda_ipc":
        await channel.receive_frame(ShownPool)
        await channel.send_frame(Reply())
    if kind.startswith("nixl"):
        shown = await channel.receive_frame(ShownAgent)
        if not shown.metadata:
            await channel.send_frame(Reply(error="there is nothing to read"))
            await channel.receive_frame(ShownBuffers)
        await channel.send_frame(Reply())
    if kind == "nccl":
        await channel.receive_frame(Invitation)  # to nothing yet
        await channel.send_frame(Reply())
    return channel


@on_sockets
async def test_a_receiver_that_hangs_fails_the_transfer_in_time(kind: str, tmp_path: Path) -> None:
    async with network(kind) as net:
        sender = await net.node(io_timeout_s=0.05)
        is_path = kind in ("shm", "cuda_ipc")
        with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as listener:
            listener.setblocking(False)
            listener.bind(str(tmp_path / "s") if is_path else ("127.0.0.1", 0))
            listener.listen()
            address = listener.getsockname() if is_path else f"127.0.0.1:{listener.getsockname()[1]}"
            address = f"tls://{address}" if kind.startswith("tls") else address
            async with asyncio.TaskGroup() as tasks:
                hanging = tasks.create_task(greet_and_hang(listener, kind))
                link = await sender.connector.connect(address, LINK_TOKEN, 24)
            with await hanging:
                with pytest.raises(TransferFailed, match=r"0\.05 s"):
                    await link.send_blocks("r.1", "any", [Copy(0, 0, 1)])


@on_sockets
async def test_a_link_outlives_a_connection(kind: str) -> None:
    """The peer closed the idle connection: the next send dials anew instead of failing."""
    async with network(kind) as net:
        receiver, sender = await net.node(), await net.node()
        link = await sender.connector.connect(receiver.address, LINK_TOKEN, 24)
        assert isinstance(link, StreamLink)
        assert link._channel is not None
        socket.socket.shutdown(link._channel.sock, socket.SHUT_RDWR)
        reserved = receiver.reserve(1)
        await link.send_blocks("r.1", reserved.token, [Copy(5, reserved.block_ids[0], 1)])
        assert receiver.block(reserved.block_ids[0]) == sender.block(5)


async def tcp_half_sent(receiver: Node, reserved: Reservation) -> Channel:
    """A raw sender that has sent three of four blocks and a half."""
    channel = await dial(receiver)
    await channel.send_frame(hello())
    await channel.expect_yes()
    copies = [Copy(0, reserved.block_ids[0], 4)]
    await channel.send_frame(Transfer(transfer_id="r.1", token=reserved.token, copies=copies))
    await channel.expect_yes()
    await channel.write(memoryview(b"\1" * (3 * SMALL.block_bytes + 512)))
    return channel


async def test_tcp_bytes_that_come_after_the_revocation_are_not_taken() -> None:
    async with network("tcp") as net:
        receiver, sender = await net.node(), await net.node()
        reserved = receiver.reserve(4)
        with await tcp_half_sent(receiver, reserved) as channel:
            receiver.reservations.cancel("r.1")
            assert receiver.blocks.counts().quarantined == 4
            await channel.write(memoryview(b"\1" * 512))
            await assert_hangs_up(channel)
        assert receiver.blocks.counts().free == 24
        await assert_serves(receiver, sender)


async def test_tcp_nodes_that_send_to_each_other_over_many_links_do_not_starve() -> None:
    """Every transfer waits for its peer's half, so none may wait for a free thread."""
    async with network("tcp") as net:
        one, other = await net.node(LARGE, 32), await net.node(LARGE, 32)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            for number in range(12):
                for sender, receiver in ((one, other), (other, one)):
                    link = await sender.connector.connect(receiver.address, LINK_TOKEN, 32)
                    reserved = receiver.reserve(2, f"r{number}.1")
                    copies = [Copy(0, reserved.block_ids[0], 2)]
                    tasks.create_task(link.send_blocks(f"r{number}.1", reserved.token, copies))
        assert one.reservations.num_ended == other.reservations.num_ended == 12


async def test_tcp_a_sender_that_leaves_halfway_leaves_the_reservation_intact() -> None:
    async with network("tcp") as net:
        receiver, sender = await net.node(), await net.node()
        reserved = receiver.reserve(4)
        (await tcp_half_sent(receiver, reserved)).close()
        async with asyncio.timeout(5):
            await receiver.reservations.ended.wait()
        assert receiver.reservations.claim("r.1", reserved.token).num_copying == 0
        await assert_serves(receiver, sender)


@pytest.mark.parametrize("passed", ["nothing", "a plain file", "a short pool"])
async def test_shm_maps_only_what_was_announced(passed: str, tmp_path: Path) -> None:
    async with network("shm") as net:
        receiver, sender = await net.node(), await net.node()
        plain = tmp_path / "plain"
        plain.write_bytes(bytes(24 * SMALL.block_bytes))
        with await dial(receiver) as channel, plain.open() as file:
            await channel.send_frame(hello(num_blocks=25 if passed == "a short pool" else 24))
            await channel.expect_yes()
            if passed == "nothing":
                await channel.write(memoryview(b"\0"))
            else:
                fd = file.fileno() if passed == "a plain file" else sender.pool.fd
                socket.send_fds(channel.sock, [b"\0"], [fd])
            await assert_hangs_up(channel)
        await assert_serves(receiver, sender)


async def test_shm_gives_mappings_and_descriptors_back() -> None:
    async with network("shm") as net:
        receiver, sender = await net.node(), await net.node()
        before = len(os.listdir("/proc/self/fd")), pool_mappings()
        for number in range(3):
            await assert_serves(receiver, sender, f"check.{number}")
        await receiver.stop_serving()
        after = len(os.listdir("/proc/self/fd")), pool_mappings()
        assert after == (before[0] - 1, before[1])  # the listener has gone as well


def pool_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:flowkv-pool")


async def start_sender(net: Network, receiver: Node, reserved: Reservation) -> asyncio.subprocess.Process:
    job = Job(
        receiver.address, LINK_TOKEN, receiver.pool.layout, receiver.pool.num_blocks, "r.1", reserved.token
    )
    command = [sys.executable, "-m", "tests.contract.kv_sender", net.kind, msgspec.json.encode(job).decode()]
    paths = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(*command, env=paths)


@on_sockets
async def test_a_sender_killed_in_mid_transfer_costs_no_block(kind: str) -> None:
    async with network(kind) as net:
        receiver, sender = await net.node(LARGE, 32), await net.node(LARGE, 8)
        reserved = receiver.reserve(32)
        process = await start_sender(net, receiver, reserved)
        receiver.reservations.on_enter = process.kill
        async with asyncio.timeout(60):
            assert await process.wait() == -9
            await receiver.reservations.ended.wait()
        receiver.reservations.on_enter = lambda: None
        receiver.blocks.check_integrity()
        assert receiver.blocks.counts().leased == 32
        receiver.reservations.cancel("r.1")
        assert receiver.blocks.counts().free == 32
        await assert_serves(receiver, sender)
