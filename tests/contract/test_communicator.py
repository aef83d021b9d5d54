"""Communicators of two ranks: order, deadlines, aborts and new ids, over gloo in the part of NCCL."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from flowkv_engine.transport.nccl import RECEIVER, SENDER, Communicator, NcclFailed, Span
from tests.contract.gloo_pair import GlooPair

KIB = 1 << 10


def span_of(tensor: torch.Tensor) -> Span:
    return Span(tensor.data_ptr(), tensor.numel())


def numbers(num_bytes: int, first: int = 1) -> torch.Tensor:
    return (torch.arange(num_bytes) + first).to(torch.uint8)


@contextlib.asynccontextmanager
async def pair(backend: GlooPair | None = None) -> AsyncIterator[tuple[Communicator, Communicator]]:
    """A sender and a receiver that have joined; `backend` is the receiver's."""
    invites = GlooPair()
    unique_id = invites.get_unique_id()
    sender, receiver = Communicator(invites, SENDER), Communicator(backend or GlooPair(), RECEIVER)
    try:
        await asyncio.gather(sender.join(unique_id, 5.0), receiver.join(unique_id, 5.0))
        yield sender, receiver
    finally:
        for communicator in (sender, receiver):
            communicator.abort()
            assert await communicator.ended(5.0)


async def test_spans_meet_in_order_and_each_in_full() -> None:
    sizes = [1, 3 * KIB, 700 * KIB, 5]
    sources, targets = [numbers(n, n) for n in sizes], [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    async with pair() as (sender, receiver):
        for _ in range(2):
            await asyncio.gather(
                receiver.exchange([span_of(target) for target in targets], 5.0),
                sender.exchange([span_of(source) for source in sources], 5.0),
            )
            assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))
            for target in targets:
                target.zero_()


async def test_a_receive_that_nobody_meets_ends_in_time_and_aborts() -> None:
    source, target = numbers(KIB), torch.zeros(KIB, dtype=torch.uint8)
    async with pair() as (sender, receiver):
        with pytest.raises(NcclFailed, match=r"not done within 0\.02 s"):
            await receiver.exchange([span_of(target)], 0.02)
        with pytest.raises(NcclFailed):  # it comes too late: the abort has ended the receive
            await sender.exchange([span_of(source)], 5.0)
        with pytest.raises(NcclFailed, match="aborted"):
            await receiver.exchange([span_of(target)], 5.0)
    assert not target.any()


async def test_an_abort_ends_an_exchange_and_a_new_id_makes_a_new_pair() -> None:
    source, target = numbers(KIB), torch.zeros(KIB, dtype=torch.uint8)
    async with pair() as (_, receiver):
        receiving = asyncio.create_task(receiver.exchange([span_of(target)], 5.0))
        await asyncio.sleep(0)
        receiver.abort()
        with pytest.raises(NcclFailed, match="aborted"):
            await receiving
        with pytest.raises(NcclFailed, match="aborted"):
            await receiver.exchange([span_of(target)], 5.0)
    async with pair() as (sender, receiver):
        await asyncio.gather(
            receiver.exchange([span_of(target)], 5.0), sender.exchange([span_of(source)], 5.0)
        )
    assert torch.equal(source, target)


async def test_a_condition_that_turns_true_ends_an_exchange() -> None:
    target, stop = torch.zeros(KIB, dtype=torch.uint8), threading.Event()
    async with pair() as (_, receiver):
        receiving = asyncio.create_task(receiver.exchange([span_of(target)], 5.0, stop.is_set))
        await asyncio.sleep(0)
        stop.set()
        with pytest.raises(NcclFailed, match="aborted"):
            await receiving


class SlowToAbort(GlooPair):
    """Its abort takes until `may_end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborting, self.may_end = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.is_aborting.set()
        assert self.may_end.wait(5)
        super().abort()


async def test_a_cancel_waits_until_the_abort_has_returned() -> None:
    backend, target = SlowToAbort(), torch.zeros(KIB, dtype=torch.uint8)
    async with pair(backend) as (_, receiver):
        receiving = asyncio.create_task(receiver.exchange([span_of(target)], 5.0))
        await asyncio.sleep(0)
        receiving.cancel()
        assert await asyncio.to_thread(backend.is_aborting.wait, 5)
        done, _ = await asyncio.wait([receiving], timeout=0.01)
        assert not done
        backend.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await receiving


async def test_a_join_without_a_peer_ends_in_time_and_its_thread_when_the_peer_comes() -> None:
    invites, late = GlooPair(), GlooPair()
    unique_id = invites.get_unique_id()
    sender = Communicator(invites, SENDER)
    with pytest.raises(NcclFailed, match=r"not joined within 0\.02 s"):
        await sender.join(unique_id, 0.02)
    assert sender.thread.is_alive()
    with contextlib.suppress(NcclFailed):  # it may find the other one gone
        await asyncio.to_thread(late.init, unique_id, RECEIVER)
    assert await sender.ended(5.0)
    late.abort()


async def test_an_abort_ends_the_wait_for_a_join() -> None:
    invites, late = GlooPair(), GlooPair()
    unique_id = invites.get_unique_id()
    sender = Communicator(invites, SENDER)
    asyncio.get_running_loop().call_soon(sender.abort)
    with pytest.raises(NcclFailed, match="before both ends had joined"):
        await sender.join(unique_id, 5.0)
    with contextlib.suppress(NcclFailed):  # it may find the other one gone
        await asyncio.to_thread(late.init, unique_id, RECEIVER)
    assert await sender.ended(5.0)
    late.abort()
