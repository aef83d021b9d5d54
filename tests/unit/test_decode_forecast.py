"""What a decode node learns of how long outputs become, from sequences that end in all ways."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from flowkv_common.aio import running
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Cancel,
    Keepalive,
    KeepaliveReply,
    SamplingParams,
    TokenIds,
    transfer_id,
)
from flowkv_common.wire.nodes import PRIOR_TOKENS, OutputForecast, length_class
from flowkv_node.endpoints import watch_cancels
from tests.engineless import Pair, Side
from tests.node_messages import decode_run, reserve
from tests.waiting import until

NUM_PROMPT_TOKENS = 4
NUM_OUTPUT_TOKENS = 3
NUM_SEQUENCES = 4


async def begin(side: Side, request_id: str, attempt: int = 0) -> str:
    """A running sequence with some tokens of output."""
    tid = transfer_id(request_id, attempt)
    reserved = await side.decode.reserve(reserve(8, transfer_id=tid))
    await side.decode.accept(
        decode_run(
            [5] * NUM_PROMPT_TOKENS,
            reserved.token,
            request_id,
            attempt=attempt,
            output_ids=TokenIds.of([7] * NUM_OUTPUT_TOKENS),
            sampling=SamplingParams(max_tokens=1000),
        )
    )
    return tid


def forecast_of(side: Side) -> OutputForecast:
    forecast = side.decode.load().forecast
    assert forecast is not None
    return forecast


async def fail_all(side: Side) -> None:
    """As a wedge does, or the end of a drain."""
    await side.node.give_back(Unavailable("stuck"))


async def lose_gateway(side: Side) -> None:
    side.node.attempts.cancel_gateway("g")


async def begin_anew(side: Side) -> None:
    """Newer attempts of the same requests, and these are given back."""
    for number in range(NUM_SEQUENCES):
        await begin(side, f"r{number}", attempt=1)
    assert len(side.node.attempts) == NUM_SEQUENCES
    await fail_all(side)


async def go_elsewhere(side: Side) -> None:
    """Their gateway has found a better node."""
    async with running(watch_cancels(side.node)):
        for attempt in side.node.attempts:
            cancel = Cancel(transfer_id=attempt.transfer_id, reason="slow", goes_on=True)
            await side.node.bus.publish(subjects.at(subjects.NODE_CANCEL, side.node.ref.node_id), cancel)
        await until(lambda: not len(side.node.attempts))


@pytest.mark.parametrize("cut", [fail_all, lose_gateway, begin_anew, go_elsewhere])
async def test_outputs_that_were_cut_off_do_not_pass_for_short_ones(
    side: Side, cut: Callable[[Side], Awaitable[None]]
) -> None:
    for number in range(NUM_SEQUENCES):
        await begin(side, f"r{number}")
    await cut(side)
    assert len(side.node.attempts) == 0
    assert forecast_of(side).stop_rate == pytest.approx(1 / PRIOR_TOKENS, rel=1e-4)
    assert forecast_of(side).by_length == {}


async def test_what_runs_tells_how_long_outputs_of_its_prompts_length_become(side: Side) -> None:
    for number in range(NUM_SEQUENCES):
        await begin(side, f"r{number}")
    forecast = forecast_of(side)
    assert forecast.by_length == {length_class(NUM_PROMPT_TOKENS): (1, PRIOR_TOKENS)}
    assert forecast.tokens_left == NUM_SEQUENCES * (PRIOR_TOKENS - NUM_OUTPUT_TOKENS)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_cancel_by_the_gateway_ends_an_output_as_a_stop_does(
    pair: Pair, side: Side, is_lost: bool
) -> None:
    """Be it that the node learns of it by the answer to a keepalive."""

    async def answer(keepalive: Keepalive) -> KeepaliveReply:
        return KeepaliveReply(unknown=list(keepalive.states))

    tid = await begin(side, "r0")
    async with running(watch_cancels(side.node), side.node.outbox.keep_alive()):
        if is_lost:
            endpoint = Endpoint(subjects.keepalive("g"), Keepalive, answer)
            async with Service(pair.bus, name="g", version="1.0.0", service_id="g", endpoints=[endpoint]):
                await until(lambda: not len(side.node.attempts))
        else:
            cancel = Cancel(transfer_id=tid, reason="the client has left")
            await pair.bus.publish(subjects.at(subjects.NODE_CANCEL, side.node.ref.node_id), cancel)
            await until(lambda: not len(side.node.attempts))
    # The mean of this one and of the one that a node assumes before it has seen any.
    expected = 2 / (PRIOR_TOKENS + NUM_OUTPUT_TOKENS)
    assert forecast_of(side).stop_rate == pytest.approx(expected, rel=1e-4)
    assert forecast_of(side).by_length.keys() == {length_class(NUM_PROMPT_TOKENS)}
