"""Taken, told to wait, or refused: and is the retry time true?"""

from __future__ import annotations

import msgspec
import pytest
from imagined_nodes import MODEL, NUM_BLOCKS, Imagined, cluster, node, request, view

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_scheduler import admission
from flowkv_scheduler.admission import Limits, room_in
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.prefixes import Keys, keys_of
from flowkv_scheduler.weighing import Goals, Weighing

LIMITS = Limits()
GOALS = Goals(max_wait_s=60.0)
PAIR = [node("p0", "prefill"), node("d0", "decode")]
# It decodes, but would compute no prompt of its own soon.
D0 = node("d0", "decode", queued_prefill_tokens=500_000)


def decide(wanted: ScheduleRequest, nodes: list[Imagined]) -> Choice | Wait:
    return admission.decide(wanted, cluster(*nodes), GOALS, LIMITS, now=0.0)


def test_pair_with_room_is_taken() -> None:
    assert isinstance(decide(request(), PAIR), Choice)


@pytest.mark.parametrize(("num_prompt", "num_new", "field"), [(4096, 1, "prompt"), (96, 4001, "max_tokens")])
def test_request_that_fits_no_pool_is_a_bad_request(num_prompt: int, num_new: int, field: str) -> None:
    with pytest.raises(errors.BadRequest, match="4096 tokens") as caught:
        decide(request(num_prompt, num_new), PAIR)
    assert caught.value.field == field


def test_request_that_just_fits_is_taken() -> None:
    assert isinstance(decide(request(96, 4000), PAIR), Choice)


def test_request_for_a_node_that_is_not_ready_is_no_bad_request() -> None:
    large = node("d1", "decode", num_blocks=2 * NUM_BLOCKS, ready=False)
    assert isinstance(decide(request(96, 5000), [*PAIR, large]), Wait)


@pytest.mark.parametrize(
    "nodes", [[], [node("p0", "prefill", ready=False)], [node("d0", "decode", age_s=9.0)]]
)
def test_without_nodes_it_waits_then_gives_up(nodes: list[Imagined]) -> None:
    decision = decide(request(), nodes)
    assert isinstance(decision, Wait)
    assert decision.retry_in_s == LIMITS.no_node_retry_s
    with pytest.raises(errors.Unavailable) as caught:
        decide(request(age_s=LIMITS.no_node_age_s + 0.1), nodes)
    assert caught.value.retry_after_s is not None


def test_nodes_of_another_model_are_no_nodes() -> None:
    """Neither their room nor their size counts: one large enough for all would let it wait for ever."""
    other = msgspec.structs.replace(MODEL, fingerprint="g")
    others = [node("m", "mixed", model=other, num_blocks=100 * NUM_BLOCKS, free=100 * NUM_BLOCKS)]
    decision = decide(request(), others)
    assert isinstance(decision, Wait)
    assert decision.reason == "no node of the model is ready"
    with pytest.raises(errors.Unavailable, match="no node of the model"):
        decide(request(age_s=LIMITS.no_node_age_s + 0.1), others)
    with pytest.raises(errors.BadRequest, match="4096 tokens"):
        decide(request(4096, 1), [*PAIR, *others])
    full = [node("p0", "prefill"), node("d0", "decode", free=0), *others]
    decision = decide(request(), full)
    assert isinstance(decision, Wait)
    assert decision.reason == "all 1 decode nodes are full"


def test_full_decode_nodes_make_it_wait() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", free=0), node("d1", "decode", free=5)]
    decision = decide(request(), nodes)
    assert isinstance(decision, Wait)
    assert LIMITS.min_retry_s <= decision.retry_in_s <= LIMITS.max_retry_s
    assert "decode nodes are full" in decision.reason


def test_full_decode_nodes_refuse_what_has_waited_too_long() -> None:
    with pytest.raises(errors.Full) as caught:
        decide(request(age_s=GOALS.max_wait_s + 1), [node("p0", "prefill"), node("d0", "decode", free=0)])
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


def test_long_queue_is_refused_and_the_retry_time_is_true() -> None:
    with pytest.raises(errors.Full) as caught:
        decide(request(), [node("p0", "prefill", queued_prefill_tokens=72_000), D0])  # at 1000 tokens/s
    assert caught.value.retry_after_s == pytest.approx(12.0)
    later = node("p0", "prefill", queued_prefill_tokens=72_000 - 12_000)
    assert isinstance(decide(request(), [later, D0]), Choice)


def test_less_urgent_requests_are_refused_first() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=31_000), D0]
    assert isinstance(decide(request(priority=0), nodes), Choice)
    with pytest.raises(errors.Full):
        decide(request(priority=1), nodes)


def test_request_without_hope_of_its_deadline_is_refused() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=20_000), D0]
    assert isinstance(decide(request(deadline_in_s=30.0), nodes), Choice)
    with pytest.raises(errors.Full, match="left"):
        decide(request(deadline_in_s=10.0), nodes)


def test_retry_of_a_running_request_is_never_shed() -> None:
    queue = node("p0", "prefill", queued_prefill_tokens=72_000)
    retry = request(age_s=GOALS.max_wait_s + 1, num_output_tokens=1, priority=1, deadline_in_s=1.0)
    assert isinstance(decide(retry, [queue, D0]), Choice)
    assert isinstance(decide(retry, [PAIR[0], node("d0", "decode", free=0)]), Wait)


def test_retry_of_a_request_that_never_began_goes_through_the_door() -> None:
    with pytest.raises(errors.Full):
        decide(request(attempt=1), [node("p0", "prefill", queued_prefill_tokens=72_000), D0])
    with pytest.raises(errors.Full):
        decide(request(attempt=2, age_s=61.0), [PAIR[0], node("d0", "decode", free=0)])


def test_room_comes_sooner_the_less_is_missing() -> None:
    wanted = request(num_prompt_tokens=400)
    full = [node("d0", "decode", free=free) for free in (26, 25, 10, 0)]
    waits = [room_in(view(one), Weighing(wanted, cluster(one), GOALS, 0.0)) for one in full]
    assert waits[0] == 0.0
    assert 0.0 < waits[1] < waits[2] < waits[3]


def test_prefixes_are_looked_up_once_also_when_the_cluster_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    state = cluster(node("p0", "prefill"), node("d0", "decode", free=0))
    look_up, asked = state.prefixes.hits, []

    def hits(keys: Keys, now: float) -> dict[str, int]:
        asked.append(keys)
        return look_up(keys, now)

    monkeypatch.setattr(state.prefixes, "hits", hits)
    wanted = request(block_hashes=["0" * 32])
    assert isinstance(admission.decide(wanted, state, GOALS, LIMITS, now=0.0), Wait)
    assert asked == [keys_of(["0" * 32])]


def test_idle_prefill_nodes_are_no_room_for_sequences() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", free=0)]
    state = cluster(*nodes)
    decision = admission.decide(request(), state, GOALS, LIMITS, now=0.0)
    assert isinstance(decision, Wait)
    assert decision.reason == "all 1 decode nodes are full"
    assert decision.retry_in_s > LIMITS.min_retry_s


def test_nobody_is_refused_for_a_rhythm_that_will_not_hold_it_up() -> None:
    """The others' rhythm holds a request up until the goal for its first token, not for their lifetimes."""
    slow = node("d0", "decode", num_running=2, free=NUM_BLOCKS - 16, decode_step_s=2.0)
    state = cluster(node("p0", "prefill"), slow)
    assert room_in(view(slow), Weighing(request(age_s=1.0), state, GOALS, 0.0)) == GOALS.ttft_s - 1.0
    assert isinstance(decide(request(age_s=1.0), [node("p0", "prefill"), slow]), Wait)
    assert isinstance(decide(request(age_s=GOALS.ttft_s), [node("p0", "prefill"), slow]), Choice)
