"""What real nodes tell of a request adds up to the time that its gateway has measured."""

from __future__ import annotations

import asyncio
import contextlib
import random
from itertools import pairwise

import pytest

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus
from flowkv_common.config import SchedulerSettings
from flowkv_common.timeline import timeline
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    FindFinished,
    FinishedRequests,
    KVTransferred,
    ModelFiles,
    NodeTimes,
    RequestFinished,
    SamplingParams,
)
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, open_dispatch
from flowkv_gateway.request_state import RequestState
from flowkv_scheduler.app import serve as serve_scheduler
from tests.live_nodes import BLOCK_SIZE, TIMEOUT_S, TOKEN_BUDGET, live_node
from tests.nats_server import NatsServer
from tests.tiny_models import VOCAB_SIZE
from tests.waiting import until

ROUNDED_S = 1e-5
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


async def ask(dispatch: Dispatch, fingerprint: str, number: int, length: int) -> None:
    rng = random.Random(number)
    prompt = [rng.randrange(20, VOCAB_SIZE) for _ in range(length)]
    async for _ in dispatch.generate(RequestState(f"r{number}", prompt, GREEDY, TIMEOUT_S, fingerprint)):
        pass


def part(event: RequestFinished, name: str) -> NodeTimes:
    [attempt] = event.attempt_times
    [times] = [times for times in attempt.nodes if times.part == name]
    return times


def check_line(event: RequestFinished, transferred: KVTransferred | None) -> None:
    """Every chunk, every byte, and a sum that is the wall time."""
    in_line = [span for span in timeline(event) if not span.is_beside]
    total_s = event.phases_s["total"]
    assert sum(span.took_s for span in in_line) == pytest.approx(total_s, rel=0.02, abs=0.002)
    for span, following in pairwise(in_line):
        assert span.began_s + span.took_s == pytest.approx(following.began_s, abs=ROUNDED_S)
    [attempt] = event.attempt_times
    prefill, decode = part(event, "prefill"), part(event, "decode")
    # A node can't have had it for longer than the gateway waited for it, nor done more than it had time for.
    assert attempt.assigned_s is not None
    assert attempt.first_token_s is not None
    assert prefill.total_s <= attempt.first_token_s - attempt.assigned_s + ROUNDED_S
    for times in (prefill, decode):
        assert sum(phase.took_s for phase in times.phases) <= times.total_s + ROUNDED_S
    num_computed = event.num_prompt_tokens - event.num_cached_tokens
    chunks = [phase.num_tokens for phase in prefill.phases if phase.name == "chunk"]
    assert sum(chunks) == num_computed
    assert max(chunks) <= TOKEN_BUDGET
    names = [span.name for span in in_line]
    assert names[0] == "schedule"
    assert "chunk" in names
    # Decode's token may overtake prefill's on the bus: then its step is over when the first token comes.
    assert attempt.second_token_s is not None
    assert "step" in names or attempt.second_token_s <= attempt.first_token_s + ROUNDED_S
    if transferred is None:
        return
    sends = part(event, "handoff").phases
    assert sum(send.num_bytes for send in sends) == transferred.num_bytes
    assert sum(send.took_s for send in sends) == pytest.approx(transferred.total_s, abs=ROUNDED_S)
    assert "reserve" in names


@pytest.mark.parametrize(
    ("num_pairs", "num_requests"),
    [(1, 4), pytest.param(1, 200, marks=pytest.mark.full), pytest.param(2, 200, marks=pytest.mark.full)],
)
async def test_the_sums_are_the_wall_time(
    nats_server: NatsServer, bus: Bus, model: LoadedModel, num_pairs: int, num_requests: int
) -> None:
    fingerprint, transfers = model.card.fingerprint, dict[str, KVTransferred]()
    finished: asyncio.Queue[RequestFinished] = asyncio.Queue()
    # No chunk keeps this ITL goal: no prompt stays on the decode node.
    settings = SchedulerSettings(nats_url=nats_server.url, itl_goal_s=1e-6, lending=False)
    async with (
        running(serve_scheduler(settings, asyncio.Event())),
        contextlib.AsyncExitStack() as nodes,
        open_dispatch(nats_server.url, [ModelNodes(OwnModel(ModelFiles()))]) as dispatch,
        await bus.subscribe(
            subjects.event("kv_transferred", ">"),
            KVTransferred,
            lambda event: transfers.update({event.transfer_id: event}),
        ),
        await bus.subscribe(subjects.event("request_finished", "*"), RequestFinished, finished.put),
    ):
        for number in range(num_pairs):
            for role, peers in (("prefill", 2 * number), ("decode", 2 * number + 1)):
                node = live_node(nats_server, bus, model, f"{role}-{number}", role=role, peers=peers)
                await nodes.enter_async_context(node)
        async with asyncio.timeout(10 * TIMEOUT_S):
            for first in range(0, num_requests, 4):
                lengths = [(5, 63, 130, 8 * BLOCK_SIZE)[place] for place in range(4)]
                async with asyncio.TaskGroup() as tasks:
                    for place, length in enumerate(lengths):
                        tasks.create_task(ask(dispatch, fingerprint, first + place, length))
            events = [await finished.get() for _ in range(num_requests)]
        handed_off = {f"{one.request_id}.0" for one in events if one.prefill_node != one.decode_node}
        await until(lambda: transfers.keys() >= handed_off)  # told after the commit, when there is time
        assert handed_off
        for event in events:
            assert event.outcome == "length"
            check_line(event, transfers.get(f"{event.request_id}.0"))
        gaps = [gap for event in events for gap in event.attempt_times[0].gaps]
        assert len(gaps) >= num_requests  # none of them keeps the goal
        found = await bus.request(
            subjects.FINISHED, FindFinished(request_id="r1"), FinishedRequests, timeout_s=TIMEOUT_S
        )
        assert found.requests == [event for event in events if event.request_id == "r1"]
