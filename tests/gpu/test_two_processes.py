"""The contract of connectors between two processes, on one GPU; and on host memory, which tries the test."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest
import torch

from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import Copy
from tests.contract.kv_nodes import NIXL, WatchedReservations
from tests.gpu.gpu_nodes import GpuNode, Outcome, Send, Setup, environment, opened, pattern
from tests.gpu.gpu_sender import SEED

LINK_TOKEN = "open sesame"
NUM_BLOCKS = 80
LAYOUT = PoolLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")  # 512 KiB
NARROW = PoolLayout(num_layers=8, block_size=16, num_kv_heads=4, head_dim=128, dtype="bfloat16")
STEP_TIMEOUT_S = 120.0  # the first communicator of a process loads its kernels

every_connector = pytest.mark.parametrize(
    ("kind", "memory"),
    [
        pytest.param("cuda_ipc", "cuda", marks=pytest.mark.gpu),
        pytest.param("nccl", "cuda", marks=pytest.mark.gpu),
        pytest.param("tcp", "cuda", marks=pytest.mark.gpu),
        pytest.param("nixl", "cuda", marks=[*NIXL.marks, pytest.mark.gpu]),
        pytest.param("cuda_ipc", "host", marks=pytest.mark.full),
        pytest.param("nccl", "host", marks=pytest.mark.full),
        pytest.param("tcp, staged", "host", marks=pytest.mark.full),
        pytest.param("nixl, both stage", "host", marks=[*NIXL.marks, pytest.mark.full]),
    ],
)


class Receiver:
    """This process's node and its books."""

    def __init__(self) -> None:
        self.blocks = Blocks(NUM_BLOCKS)
        self.reservations = WatchedReservations(self.blocks)
        self.node: GpuNode
        self.address = ""

    def reserve(self, num_blocks: int, transfer_id: str) -> Reservation:
        return self.reservations.reserve(transfer_id, num_blocks, [], [], 600.0)

    def read_all(self) -> list[bytes]:
        return [self.node.read(block) for block in range(NUM_BLOCKS)]

    def order(self, reserved: Reservation, copies: list[Copy], token: str | None = None) -> Send:
        """Destinations count from the first reserved block."""
        first = reserved.block_ids[0]
        return Send(
            address=self.address,
            link_token=LINK_TOKEN,
            num_peer_blocks=NUM_BLOCKS,
            transfer_id=reserved.transfer_id,
            token=reserved.token if token is None else token,
            copies=[Copy(src, first + dst, length) for src, dst, length in copies],
        )


class Sender:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def tell(self, what: Setup | Send) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(what) + b"\n")
        async with asyncio.timeout(STEP_TIMEOUT_S):
            return msgspec.json.decode(await self.process.stdout.readline(), type=Outcome)


@contextlib.asynccontextmanager
async def receiving(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    if setup.memory == "cuda":
        pytest.importorskip("cupy")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    for name, value in environment(setup, "receiver").items():
        monkeypatch.setenv(name, value)
    receiver = Receiver()
    async with opened(setup, receiver.reservations, LINK_TOKEN.__eq__) as receiver.node:
        receiver.address = await receiver.node.connector.listen()
        yield receiver
    receiver.blocks.check_integrity()
    assert receiver.blocks.counts().quarantined == 0


@contextlib.asynccontextmanager
async def sending(setup: Setup) -> AsyncIterator[Sender]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.gpu.gpu_sender"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment(setup, "sender") | {"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    try:
        sender = Sender(process)
        assert await sender.tell(setup) == Outcome()
        yield sender
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@every_connector
async def test_the_right_bytes_arrive_and_nothing_else_changes(
    kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(kind, memory, LAYOUT, NUM_BLOCKS)
    async with receiving(setup, monkeypatch) as receiver, sending(setup) as sender:
        receiver.node.fill(1)
        expected, sent = receiver.read_all(), pattern(receiver.node.pool, SEED)
        for number, copies in enumerate([[Copy(3, 0, 1), Copy(9, 1, 4), Copy(2, 5, 1)], [Copy(1, 0, 70)]]):
            reserved = receiver.reserve(sum(copy.length for copy in copies), f"r{number}.1")
            outcome = await sender.tell(receiver.order(reserved, copies))
            num_bytes = len(reserved.block_ids) * LAYOUT.block_bytes
            assert (outcome.error, outcome.num_bytes) == (None, num_bytes)
            if kind in ("cuda_ipc", "nccl"):  # others stage, and count that, too
                assert outcome.num_calls == len(copies)
            for src, dst, length in copies:
                start = reserved.block_ids[0] + dst
                expected[start : start + length] = [sent[src + i].numpy().tobytes() for i in range(length)]
        assert receiver.read_all() == expected


@every_connector
async def test_what_may_not_be_written_is_refused(
    kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(kind, memory, LAYOUT, NUM_BLOCKS)
    async with receiving(setup, monkeypatch) as receiver, sending(setup) as sender:
        before = receiver.read_all()
        reserved = receiver.reserve(2, "r.1")
        for order in (
            receiver.order(reserved, [Copy(0, 0, 2)], token="guessed"),
            receiver.order(reserved, [Copy(0, -1, 2)]),
            receiver.order(reserved, [Copy(0, NUM_BLOCKS, 2)]),
        ):
            assert "TransferFailed" in str((await sender.tell(order)).error)
        assert receiver.read_all() == before
        assert (await sender.tell(receiver.order(reserved, [Copy(0, 0, 2)]))).error is None


@every_connector
async def test_a_reservation_revoked_under_the_copy_stops_it_and_settles(
    kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(kind, memory, LAYOUT, NUM_BLOCKS)
    async with receiving(setup, monkeypatch) as receiver, sending(setup) as sender:
        reserved = receiver.reserve(70, "r.1")
        receiver.reservations.on_enter = lambda: receiver.reservations.cancel("r.1")
        outcome = await sender.tell(receiver.order(reserved, [Copy(0, 0, 70)]))
        assert "TransferFailed" in str(outcome.error)
        receiver.reservations.on_enter = lambda: None
        assert receiver.blocks.counts().free == NUM_BLOCKS
        again = receiver.reserve(70, "r.2")
        assert (await sender.tell(receiver.order(again, [Copy(0, 0, 70)]))).error is None


@every_connector
async def test_a_sender_killed_in_mid_transfer_costs_no_block(
    kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(kind, memory, LAYOUT, NUM_BLOCKS)
    async with receiving(setup, monkeypatch) as receiver:
        reserved = receiver.reserve(70, "r.1")
        async with sending(setup) as sender:
            receiver.reservations.on_enter = sender.process.kill
            with contextlib.suppress(msgspec.DecodeError):
                await sender.tell(receiver.order(reserved, [Copy(0, 0, 70)]))
            async with asyncio.timeout(STEP_TIMEOUT_S):
                await receiver.reservations.ended.wait()
        receiver.reservations.on_enter = lambda: None
        receiver.reservations.cancel("r.1")
        assert receiver.blocks.counts().free == NUM_BLOCKS
        async with sending(setup) as successor:
            again = receiver.reserve(70, "r.2")
            assert (await successor.tell(receiver.order(again, [Copy(0, 0, 70)]))).error is None


@every_connector
async def test_pools_of_another_layout_get_no_link(
    kind: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(kind, memory, LAYOUT, NUM_BLOCKS)
    async with receiving(setup, monkeypatch) as receiver:
        async with sending(Setup(kind, memory, NARROW, NUM_BLOCKS)) as sender:
            reserved = receiver.reserve(1, "r.1")
            outcome = await sender.tell(receiver.order(reserved, [Copy(0, 0, 1)]))
            assert "layouts differ" in str(outcome.error)
