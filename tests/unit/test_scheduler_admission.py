"""Taken, told to wait, or refused: and is the retry time true?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_common.wire.nodes import OutputForecast, StepFit
from flowkv_scheduler import admission
from flowkv_scheduler.admission import WAIT_ERROR, Later, WaitingQueue
from flowkv_scheduler.cluster import ClusterState, Goals, Work
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.prefixes import Hits, Keys, keys_of
from tests.described_nodes import MODEL, NUM_BLOCKS, Described, cluster, node, request

GOALS = Goals(max_wait_s=60.0)
PAIR = [node("p0", "prefill"), node("d0", "decode")]
# It decodes, but would compute no prompt of its own soon.
D0 = node("d0", "decode", queued_prefill_tokens=500_000)


def decide(
    wanted: ScheduleRequest, nodes: list[Described], waiting: WaitingQueue | None = None
) -> Choice | Wait:
    return told(admission.decide(wanted, cluster(*nodes), GOALS, 0.0, waiting or WaitingQueue()))


def told(decision: Choice | Later) -> Choice | Wait:
    return decision if isinstance(decision, Choice) else decision.wait


def test_pair_with_room_is_taken() -> None:
    assert isinstance(decide(request(), PAIR), Choice)


@pytest.mark.parametrize(("num_prompt", "num_new", "field"), [(4096, 1, "prompt"), (96, 4001, "max_tokens")])
def test_request_that_fits_no_pool_is_a_bad_request(num_prompt: int, num_new: int, field: str) -> None:
    with pytest.raises(errors.BadRequest, match="maximum context length is 4096 tokens") as caught:
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
def test_without_nodes_it_waits_then_gives_up(nodes: list[Described]) -> None:
    decision = decide(request(), nodes)
    assert isinstance(decision, Wait)
    assert decision.retry_in_s == admission.NO_NODE_RETRY_S
    with pytest.raises(errors.Unavailable) as caught:
        decide(request(age_s=admission.NO_NODE_AGE_S + 0.1), nodes)
    assert caught.value.retry_after_s is not None


def test_nodes_of_another_model_are_no_nodes() -> None:
    """Neither their room nor their size counts: one large enough for all would let it wait for ever."""
    other = msgspec.structs.replace(MODEL, fingerprint="g")
    others = [node("m", "mixed", model=other, num_blocks=100 * NUM_BLOCKS, free=100 * NUM_BLOCKS)]
    decision = decide(request(), others)
    assert isinstance(decision, Wait)
    assert decision.reason == "no node of the model is ready"
    with pytest.raises(errors.Unavailable, match="no node of the model"):
        decide(request(age_s=admission.NO_NODE_AGE_S + 0.1), others)
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
    assert admission.MIN_RETRY_S <= decision.retry_in_s <= admission.MAX_RETRY_S
    assert "decode nodes are full" in decision.reason


def test_full_decode_nodes_refuse_what_has_waited_too_long() -> None:
    with pytest.raises(errors.Full) as caught:
        decide(request(age_s=WAIT_ERROR * GOALS.max_wait_s + 1), [PAIR[0], node("d0", "decode", free=0)])
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
        decide(
            request(attempt=2, age_s=WAIT_ERROR * GOALS.max_wait_s + 1),
            [PAIR[0], node("d0", "decode", free=0)],
        )


def test_prefixes_are_looked_up_once_also_when_the_cluster_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    state = cluster(node("p0", "prefill"), node("d0", "decode", free=0))
    look_up, asked = state.prefixes.hits, []

    def hits(keys: Keys, now: float) -> Hits:
        asked.append(keys)
        return look_up(keys, now)

    monkeypatch.setattr(state.prefixes, "hits", hits)
    wanted = request(block_hashes=["0" * 32])
    assert isinstance(told(admission.decide(wanted, state, GOALS, 0.0, WaitingQueue())), Wait)
    assert asked == [keys_of(["0" * 32])]


def test_idle_prefill_nodes_are_no_room_for_sequences() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", free=0, num_running=2)]
    state = cluster(*nodes)
    decision = told(admission.decide(request(), state, GOALS, 0.0, WaitingQueue()))
    assert isinstance(decision, Wait)
    assert decision.reason == "all 1 decode nodes are full"
    assert decision.retry_in_s > admission.MIN_RETRY_S


def test_nobody_is_held_up_for_ever_for_the_sake_of_others_rhythm() -> None:
    """It holds a request up until the goal for its first token, not for their lifetimes."""
    slow = node("d0", "decode", num_running=2, free=NUM_BLOCKS - 16, decode_step_s=2.0)
    nodes = [node("p0", "prefill"), slow]
    early = decide(request(age_s=1.0), nodes)
    assert isinstance(early, Wait)
    assert early.first_token_in_s == pytest.approx(GOALS.ttft_s - 1.0, rel=0.1)
    assert isinstance(decide(request(age_s=GOALS.ttft_s), nodes), Choice)


def test_a_prompt_that_fits_no_pool_with_its_next_token_is_refused_at_once() -> None:
    """A prefill node of 256 blocks never gets the 257th, though its 4096 tokens fill 256 to the brim."""
    large = node("d0", "decode", num_blocks=2 * NUM_BLOCKS, num_running=1, free=2 * NUM_BLOCKS - 2)
    small = node("p0", "prefill")
    assert isinstance(decide(request(NUM_BLOCKS * 16 - 1, 10), [small, large]), Choice)
    brimful = decide(request(NUM_BLOCKS * 16, 10), [small, large])
    assert isinstance(brimful, Choice)
    assert brimful.prefill.node_id == "d0"
    with pytest.raises(errors.BadRequest, match="maximum context length is 8192 tokens"):
        decide(request(2 * NUM_BLOCKS * 16, 1), [small, large])


def full_node(num_running: int, max_num_seqs: int = 16) -> Described:
    return node("d0", "decode", num_running=num_running, max_num_seqs=max_num_seqs, free=NUM_BLOCKS - 16)


def test_a_full_batch_is_no_room() -> None:
    assert isinstance(decide(request(), [PAIR[0], full_node(15)]), Choice)
    assert isinstance(decide(request(), [PAIR[0], full_node(16)]), Wait)


def waiting_behind(others: list[ScheduleRequest], at: str = "d0") -> WaitingQueue:
    waiting = WaitingQueue()
    for other in others:
        waiting.add_waiter(
            other, at, Work(other.num_prompt_tokens, 1, 7, other.num_prompt_tokens, 50.0), 0.5, 0.0
        )
    return waiting


def others(num: int, **changes: Any) -> list[ScheduleRequest]:
    return [request(request_id=f"o{i}", **{"age_s": 1.0} | changes) for i in range(num)]


def test_who_comes_later_waits_for_longer() -> None:
    nodes = [PAIR[0], full_node(16)]
    waits = [decide(request(), nodes, waiting_behind(others(num))) for num in (0, 8, 16, 32)]
    foreseen = [wait.first_token_in_s for wait in waits if isinstance(wait, Wait)]
    assert foreseen == sorted(set(foreseen))
    assert len(foreseen) == 4


def test_who_comes_too_late_is_refused_when_it_comes_not_after_it_has_waited() -> None:
    nodes, crowd = [PAIR[0], full_node(16)], waiting_behind(others(1000))
    with pytest.raises(errors.Full) as caught:
        decide(request(), nodes, crowd)
    assert caught.value.retry_after_s is not None
    patient = admission.decide(request(deadline_in_s=1e6), cluster(*nodes), Goals(max_wait_s=1e6), 0.0, crowd)
    assert isinstance(patient, Later)
    assert caught.value.retry_after_s == pytest.approx(patient.wait.first_token_in_s - 60.0, rel=0.05)


def test_short_outputs_make_short_waits() -> None:
    """The crowd's `max_tokens` say how long it holds its places: 16 tokens are not 128."""
    few = OutputForecast(tokens_left=16 * 8.0, first_ends_in=1.0, stop_rate=1e-5)
    many = OutputForecast(tokens_left=16 * 64.0, first_ends_in=1.0, stop_rate=1e-5)
    waits = []
    for forecast, num_new in ((few, 16), (many, 128)):
        busy = msgspec.structs.replace(full_node(16).report, forecast=forecast)
        nodes = [PAIR[0], full_node(16)._replace(report=busy)]
        wait = decide(request(4, num_new), nodes, waiting_behind(others(32, num_prompt_tokens=4)))
        assert isinstance(wait, Wait)
        waits.append(wait.first_token_in_s)
    assert waits[1] == pytest.approx(8 * waits[0], rel=0.2)


def test_prompts_ahead_count_where_prefill_is_the_narrow_side() -> None:
    nodes = [PAIR[0], full_node(16)]
    short = decide(request(), nodes, waiting_behind(others(8)))
    long = decide(request(), nodes, waiting_behind(others(8, num_prompt_tokens=4000)))
    assert isinstance(short, Wait)
    assert isinstance(long, Wait)
    assert long.first_token_in_s > 8 * 4000 / 1000.0 > 2 * short.first_token_in_s


def test_who_has_been_let_in_is_not_sent_away_for_what_is_foreseen_later() -> None:
    nodes, crowd = [PAIR[0], full_node(16)], others(1000)
    mine = request(request_id="mine", age_s=30.0, priority=6)  # behind them all
    assert isinstance(decide(mine, nodes, waiting_behind([*crowd, mine])), Wait)
    with pytest.raises(errors.Full):
        decide(mine, nodes, waiting_behind(crowd))
    old = msgspec.structs.replace(mine, age_s=WAIT_ERROR * GOALS.max_wait_s + 1)
    with pytest.raises(errors.Full):
        decide(old, nodes, waiting_behind([*crowd, old]))
    # A pair for it is no reason to send it away.
    assert isinstance(decide(old, PAIR, waiting_behind([old])), Choice)


def test_room_for_those_ahead_is_not_given_away() -> None:
    """Nine blocks are free: seven for who came first, and not seven more."""
    tight = node("d0", "decode", num_running=2, free=9)
    first, second = request(request_id="first", age_s=2.0), request(request_id="second", age_s=1.0)
    waiting = waiting_behind([first])
    assert isinstance(decide(second, [PAIR[0], tight], waiting), Wait)
    assert isinstance(decide(first, [PAIR[0], tight], waiting), Choice)
    roomy = node("d0", "decode", num_running=2, free=14)
    assert isinstance(decide(second, [PAIR[0], roomy], waiting), Choice)


def test_the_last_place_in_the_batch_is_for_who_came_first() -> None:
    first, second = request(request_id="first", age_s=2.0), request(request_id="second", age_s=1.0)
    nodes, waiting = [PAIR[0], full_node(15)], waiting_behind([first])
    assert isinstance(decide(second, nodes, waiting), Wait)
    assert isinstance(decide(first, nodes, waiting), Choice)


def test_room_that_those_ahead_cant_use_is_given_away() -> None:
    """The first stands at another node, and is too long for this one."""
    first = request(3000, 50, request_id="first", age_s=2.0)
    nodes = [
        PAIR[0],
        node("d0", "decode", num_running=2, free=9),
        node("d1", "decode", free=0, num_running=9),
    ]
    waiting = WaitingQueue()
    waiting.add_waiter(first, "d1", Work(3000, 1, 188, 3000, 50.0), 0.5, 0.0)
    choice = decide(request(request_id="second"), nodes, waiting)
    assert isinstance(choice, Choice)
    assert choice.decode.node_id == "d0"


def test_room_is_kept_at_one_node_for_each_request_ahead() -> None:
    """Three nodes have a place each: one is kept, and the next two who come get the others."""
    nodes = [PAIR[0], *(node(f"d{i}", "decode", num_running=15) for i in range(3))]
    waiting = waiting_behind([request(request_id="first", age_s=2.0)])
    choice = decide(request(request_id="second", age_s=1.0), nodes, waiting)
    assert isinstance(choice, Choice)
    assert choice.decode.node_id != "d0"
    three = waiting_behind([request(request_id=f"r{i}", age_s=2.0) for i in range(3)])
    assert isinstance(decide(request(request_id="fourth", age_s=1.0), nodes, three), Wait)


def test_a_request_that_waits_for_a_first_node_is_served_before_a_later_one() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(request(request_id="first", age_s=5.0), "", Work(), 0.5, 0.0)
    nodes = [PAIR[0], full_node(15)]
    assert isinstance(decide(request(request_id="late"), nodes, waiting), Wait)
    assert isinstance(decide(request(request_id="first", age_s=5.0), nodes, waiting), Choice)


def test_requests_for_another_model_hold_no_room_here() -> None:
    other = msgspec.structs.replace(request(request_id="first", age_s=2.0), fingerprint="another")
    nodes, waiting = [PAIR[0], full_node(15)], waiting_behind([other])
    assert isinstance(decide(request(request_id="second", age_s=1.0), nodes, waiting), Choice)


def test_the_retry_of_a_running_request_stands_before_all_others() -> None:
    nodes = [PAIR[0], node("d0", "decode", num_running=2, free=9)]
    waiting = waiting_behind([request(request_id="urgent", age_s=50.0, priority=-6)])
    assert isinstance(decide(request(request_id="retry", num_output_tokens=3), nodes, waiting), Choice)


def test_blocks_of_sequences_on_their_way_are_not_given_twice() -> None:
    """Given and reserved, though no report shows them as leased yet."""
    state: ClusterState = cluster(PAIR[0], node("d0", "decode", free=12, given=Work(0, 1, 7, 100)))
    assert isinstance(told(admission.decide(request(), state, GOALS, 0.0, WaitingQueue())), Wait)


def test_a_prefill_node_that_decodes_besides_keeps_time_for_prompts() -> None:
    """However long who asks has waited: others wait for the prompts that it would hold up."""
    fit = StepFit(
        base_s=0.02, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0
    )
    lent: dict[str, Any] = {"max_prefill_tokens_per_step": 100, "step": fit, "queued_prefill_tokens": 200}
    full = full_node(16)
    for num_running, has_room in ((9, True), (10, False)):  # a step of 20 + 10 x 10 ms; half of 250 are 125
        helper = node("p0", "prefill", num_running=num_running, **lent)
        decision = decide(request(age_s=10.0), [helper, full])
        assert isinstance(decision, Choice) == has_room


def test_a_wait_is_foreseen_to_be_shorter_where_an_idle_prefill_node_will_be_lent() -> None:
    """If outputs are so long that prompts come slowly while the line drains; not for short ones."""
    forecast = OutputForecast(tokens_left=16 * 128.0, first_ends_in=128.0, stop_rate=1e-6)
    busy = msgspec.structs.replace(full_node(16).report, forecast=forecast)
    state = cluster(PAIR[0], full_node(16)._replace(report=busy))
    for num_new, is_lent in ((128, True), (2, False)):
        wanted = request(50, num_new)
        waits = [
            told(admission.decide(wanted, state, GOALS, 0.0, WaitingQueue(), lends=lends))
            for lends in (False, True)
        ]
        alone, helped = (wait.first_token_in_s for wait in waits if isinstance(wait, Wait))
        assert (helped < alone) == is_lent
    helped_wait = admission.decide(request(50, 128), state, GOALS, 0.0, WaitingQueue(), lends=True)
    assert isinstance(helped_wait, Later)
    assert helped_wait.node_id == "p0"  # it stands there, behind nobody
    assert helped_wait.wait.first_token_in_s == pytest.approx(admission.LENT_IN_S, abs=0.2)
    # The node that helps already is no other one.
    helping = node("p0", "prefill", max_prefill_tokens_per_step=100, num_running=15)
    both = cluster(helping, full_node(16)._replace(report=busy))
    found = [
        told(admission.decide(request(50, 128), both, GOALS, 0.0, WaitingQueue(), lends=lends))
        for lends in (False, True)
    ]
    assert found[0] == found[1]
