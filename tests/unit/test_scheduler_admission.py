"""Taken, told to wait, or refused: and is the retry time true?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_common.wire.nodes import OutputForecast, StepFit, length_class
from flowkv_scheduler import admission, policy
from flowkv_scheduler.admission import (
    IN_TIME,
    NUM_FORESEEN,
    NUM_FORESEEN_AGAIN,
)
from flowkv_scheduler.cluster import ClusterState, Goals
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.lookahead import IDLE_WAIT
from flowkv_scheduler.node_view import NodeView, Work
from flowkv_scheduler.policy import Choice, RequestCosts
from flowkv_scheduler.prefixes import Hits, Keys, keys_of
from flowkv_scheduler.waiting import WAIT_ERROR, Later, WaitingQueue
from tests.described_nodes import MODEL, NUM_BLOCKS, TOKEN_BUDGET, Described, cluster, later, node, request

GOALS = Goals(max_wait_s=60.0)
PAIR = [node("p0", "prefill"), node("d0", "decode")]
# It decodes, but would compute no prompt of its own soon.
D0 = node("d0", "decode", queued_prefill_tokens=500_000)


def decide(
    wanted: ScheduleRequest, nodes: list[Described], waiting: WaitingQueue | None = None
) -> Choice | Wait:
    return told(admission.decide(wanted, cluster(*nodes), GOALS, 0.0, waiting or WaitingQueue()))


def choice_of(wanted: ScheduleRequest, nodes: list[Described]) -> Choice:
    found = decide(wanted, nodes)
    assert isinstance(found, Choice)
    return found


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
    assert decision.retry_in_s == admission.MAX_RETRY_S
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
    soon = node("p0", "prefill", queued_prefill_tokens=72_000 - 12_000)
    wait = decide(request(), [soon, D0])
    assert isinstance(wait, Wait)
    assert wait.first_token_in_s == pytest.approx(60.1)


def test_less_urgent_requests_are_refused_first() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=31_000), D0]
    assert isinstance(decide(request(priority=0), nodes), Wait)
    with pytest.raises(errors.Full):
        decide(request(priority=1), nodes)


def test_request_without_hope_of_its_deadline_is_refused() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=20_000), D0]
    assert isinstance(decide(request(deadline_in_s=30.0), nodes), Wait)
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


def test_the_wait_for_the_itl_target_of_others_is_told_as_it_is() -> None:
    """Beside a new sequence the step has room for one of nine."""
    fit = StepFit(base_s=0.02, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.1, context_token_s=0.0)
    slow = node("d0", "decode", num_running=9, free=NUM_BLOCKS - 16, step=fit)
    state = cluster(node("p0", "prefill"), slow)
    patient = msgspec.structs.replace(GOALS, max_wait_s=1e9)
    waits = []
    for age_s in (1.0, GOALS.longest_wait_s):
        decision = told(admission.decide(request(age_s=age_s), state, patient, 0.0, WaitingQueue()))
        assert isinstance(decision, Wait)
        waits.append(decision.first_token_in_s)
    assert waits[0] == waits[1] > GOALS.longest_wait_s
    with pytest.raises(errors.Full, match="would wait for about"):
        admission.decide(request(), state, GOALS, 0.0, WaitingQueue())


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
    """Each of its sequences has 10 blocks and will produce 20 tokens more."""
    return node(
        "d0",
        "decode",
        num_running=num_running,
        max_num_seqs=max_num_seqs,
        free=NUM_BLOCKS - 10 * num_running,
        forecast=OutputForecast(tokens_left=20.0 * num_running, first_ends_in=2.0, stop_rate=1 / 256),
    )


def test_a_full_batch_is_no_room() -> None:
    assert isinstance(decide(request(), [PAIR[0], full_node(15)]), Choice)
    assert isinstance(decide(request(), [PAIR[0], full_node(16)]), Wait)


# Blocks that `request` takes: 100 tokens, and 45 of the 50 that it may produce are expected.
NUM_NEEDED = 10


def waiting_behind(others: list[ScheduleRequest], at: str = "d0") -> WaitingQueue:
    waiting = WaitingQueue()
    for other in others:
        need = Work(other.num_prompt_tokens, 1, NUM_NEEDED, other.num_prompt_tokens, 50.0)
        waiting.add_waiter(other, later(at, need), now=0.0)
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
    """`max_tokens` say how long the others hold their places: 16 tokens are not 128."""
    unending = {length_class(4): (1000.0, 1e8)}
    few = OutputForecast(tokens_left=16 * 8.0, first_ends_in=1.0, stop_rate=1e-5, by_length=unending)
    many = msgspec.structs.replace(few, tokens_left=16 * 64.0)
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


def test_who_stands_at_a_node_that_is_lent_since_waits_on() -> None:
    first = request(request_id="r0", age_s=1.0)
    lent = [node("p0", "prefill", free=0), node("d0", "prefill", free=0)]
    assert isinstance(decide(first, lent, waiting_behind([first])), Wait)


def test_room_for_those_ahead_is_not_given_away() -> None:
    """15 blocks are free: 10 for the first request, and not 10 more."""
    tight = node("d0", "decode", num_running=2, free=NUM_NEEDED + 5)
    first, second = request(request_id="first", age_s=2.0), request(request_id="second", age_s=1.0)
    waiting = waiting_behind([first])
    assert isinstance(decide(second, [PAIR[0], tight], waiting), Wait)
    assert isinstance(decide(first, [PAIR[0], tight], waiting), Choice)
    roomy = node("d0", "decode", num_running=2, free=2 * NUM_NEEDED)
    assert isinstance(decide(second, [PAIR[0], roomy], waiting), Choice)


def test_the_last_place_in_the_batch_is_for_who_came_first() -> None:
    first, second = request(request_id="first", age_s=2.0), request(request_id="second", age_s=1.0)
    nodes, waiting = [PAIR[0], full_node(15)], waiting_behind([first])
    assert isinstance(decide(second, nodes, waiting), Wait)
    assert isinstance(decide(first, nodes, waiting), Choice)


@pytest.mark.parametrize(("num_ahead", "num_looks"), [(39, 1), (40, 0)])
def test_who_has_as_many_before_it_as_places_are_free_waits(num_ahead: int, num_looks: int) -> None:
    """No node is looked at for it then, however many there are."""
    nodes = [PAIR[0], *(node(f"d{i:02}", "decode", num_running=15 + i % 2) for i in range(80))]
    waiting, looks = waiting_behind(others(num_ahead)), list[RequestCosts]()

    def choose(costs: RequestCosts) -> Choice | None:
        looks.append(costs)
        return policy.choose(costs)

    found = admission.decide(request(), cluster(*nodes), GOALS, 0.0, waiting, choose=choose)
    assert (isinstance(found, Later), len(looks)) == (True, num_looks)


def test_those_that_wait_for_an_idle_prefill_node_take_no_place_before_others() -> None:
    nodes, waiting = [PAIR[0], full_node(15)], WaitingQueue()
    for late in others(40, age_s=9.0):
        waiting.add_waiter(late, later(f"late {MODEL.fingerprint}", Work(100, 1)), now=0.0)
    assert isinstance(decide(request(request_id="second"), nodes, waiting), Choice)


def test_room_that_those_ahead_cant_use_is_given_away() -> None:
    """The first stands at another node, and is too long for this one."""
    first = request(3000, 50, request_id="first", age_s=2.0)
    nodes = [
        PAIR[0],
        node("d0", "decode", num_running=2, free=NUM_NEEDED),
        node("d1", "decode", free=0, num_running=9),
    ]
    waiting = WaitingQueue()
    waiting.add_waiter(first, later("d1", Work(3000, 1, 191, 3000, 50.0)), now=0.0)
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


def test_room_is_kept_from_a_request_that_needs_less_of_it_where_its_prefix_is_cached() -> None:
    """It needs more blocks than the 40 that are free, but not beside 8 that are cached."""
    nodes, wanted = [PAIR[0], node("d0", "decode", free=40)], request(640, request_id="second", age_s=1.0)
    hits = Hits([(8, 1)], ["d0"], {"d0": 1})

    def decide_behind(*ahead: ScheduleRequest) -> Choice | Wait:
        waiting = waiting_behind([*ahead])
        return told(admission.decide(wanted, cluster(*nodes), GOALS, 0.0, waiting, hits=hits))

    assert isinstance(decide_behind(), Choice)
    assert isinstance(decide_behind(request(request_id="first", age_s=2.0)), Wait)


def test_a_request_that_waits_for_a_first_node_is_served_before_a_later_one() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(request(request_id="first", age_s=5.0), later(""), now=0.0)
    nodes = [PAIR[0], full_node(15)]
    assert isinstance(decide(request(request_id="late"), nodes, waiting), Wait)
    assert isinstance(decide(request(request_id="first", age_s=5.0), nodes, waiting), Choice)


def test_requests_for_another_model_hold_no_room_here() -> None:
    other = msgspec.structs.replace(request(request_id="first", age_s=2.0), fingerprint="another")
    nodes, waiting = [PAIR[0], full_node(15)], waiting_behind([other])
    assert isinstance(decide(request(request_id="second", age_s=1.0), nodes, waiting), Choice)


def test_a_crowd_for_another_model_hides_no_request_that_waits_here() -> None:
    """Only the first who wait are looked at, to keep room for them: the first of their own model."""
    crowd = [
        request(request_id=f"o{number}", age_s=9.0, fingerprint="another")
        for number in range(admission.NUM_KEPT_FOR)
    ]
    waiting = waiting_behind([*crowd, request(request_id="first", age_s=5.0)])
    assert isinstance(decide(request(request_id="late"), [PAIR[0], full_node(15)], waiting), Wait)


def test_the_retry_of_a_running_request_stands_before_all_others() -> None:
    nodes = [PAIR[0], node("d0", "decode", num_running=2, free=NUM_NEEDED)]
    waiting = waiting_behind([request(request_id="urgent", age_s=50.0, priority=-6)])
    assert isinstance(decide(request(request_id="retry", num_output_tokens=3), nodes, waiting), Choice)


def test_blocks_of_sequences_on_their_way_are_not_given_twice() -> None:
    """Given and reserved, though no report shows them as leased yet."""
    state: ClusterState = cluster(PAIR[0], node("d0", "decode", free=12, given=Work(0, 1, 7, 100)))
    assert isinstance(told(admission.decide(request(), state, GOALS, 0.0, WaitingQueue())), Wait)


def test_a_prefill_node_that_decodes_besides_keeps_time_for_prompts() -> None:
    """However long the request has waited: others wait for the prompts that it would delay."""
    fit = StepFit(
        base_s=0.02, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0
    )
    lent: dict[str, Any] = {"max_prefill_tokens_per_step": 100, "step": fit, "queued_prefill_tokens": 50}
    full = full_node(16)
    for num_running, has_room in ((2, True), (3, False)):  # a step of 20 + 3 x 10 ms; a fifth of 250 are 50
        helper = node("p0", "prefill", num_running=num_running, **lent)
        decision = decide(request(age_s=GOALS.longest_wait_s / 2 + 1.0), [helper, full])
        assert isinstance(decision, Choice) == has_room


# --- in time, late, overdue ------------------------------------------------------------------------

# Seconds of prompts that may be queued before a prompt of 100 tokens, at 1000 tokens/s.
IN_TIME_S = IN_TIME * GOALS.ttft_s - 0.1
IDLE_S = IDLE_WAIT * GOALS.ttft_s


def behind(queued_s: float) -> list[Described]:
    """A pair with room, and so many seconds of prompts that are queued at the prefill node."""
    return [node("p0", "prefill", queued_prefill_tokens=round(queued_s * 1000)), D0]


def test_a_request_in_time_is_served_behind_other_prompts() -> None:
    assert isinstance(decide(request(), behind(IN_TIME_S)), Choice)
    late = admission.decide(request(), cluster(*behind(IN_TIME_S + 0.1)), GOALS, 0.0, WaitingQueue())
    assert isinstance(late, Later)
    assert late.is_late
    assert "prefill nodes are busy" in late.wait.reason
    assert late.wait_s == pytest.approx(IN_TIME_S + 0.1)
    # Its age counts.
    assert isinstance(decide(request(age_s=1.0), behind(IN_TIME_S - 0.9)), Wait)


def test_a_late_request_is_served_when_a_prefill_node_is_idle() -> None:
    late = request(age_s=GOALS.ttft_s)
    assert isinstance(decide(late, behind(IDLE_S)), Choice)
    assert isinstance(decide(late, behind(IDLE_S + 0.1)), Wait)
    # One that would be late behind no other is no exception.
    roomy = [
        node(name, role, num_blocks=1000, free=1000) for name, role in (("p0", "prefill"), ("d0", "decode"))
    ]
    assert isinstance(decide(request(10_000), roomy), Choice)


def test_a_late_request_takes_the_idle_node_though_a_busy_one_is_better() -> None:
    """The busy one has cached its prompt, so its first token would come soonest there."""
    hashes = [f"{number:016x}" * 2 for number in range(248)]
    busy, idle = node("p0", "prefill", queued_prefill_tokens=1000), node("p1", "prefill")
    state = cluster(busy, idle, D0)
    state.prefixes.expect([busy.descriptor.node], hashes, until=9.0)
    wanted = request(3969, 50, block_hashes=hashes)
    prompt = admission.decide(wanted, state, GOALS, 0.0, WaitingQueue())
    assert isinstance(prompt, Choice)
    assert prompt.prefill.node_id == "p0"
    late = msgspec.structs.replace(wanted, age_s=GOALS.ttft_s)
    served = admission.decide(late, state, GOALS, 0.0, WaitingQueue())
    assert isinstance(served, Choice)
    assert served.prefill.node_id == "p1"
    # If it can't: the idle node of another kind is for late requests behind it.
    other = node("p1", "prefill", memory="device")
    apart = cluster(busy, other, D0, node("d1", "decode", memory="device", free=0, num_running=1))
    waiting = WaitingQueue()
    waits = admission.decide(late, apart, GOALS, 0.0, waiting)
    assert isinstance(waits, Later)
    assert waits.node_id == ""


def test_a_request_in_time_does_not_wait_for_late_prompts() -> None:
    """It interrupts them, between two chunks. Late ones, and the class `batch`, wait for all."""
    giant: dict[str, Any] = {"queued_prefill_tokens": 30_000, "interruptible_prefill_tokens": 30_000}
    nodes = [node("p0", "prefill", **giant), D0]
    rest_s = TOKEN_BUDGET / 2 / 1000
    served = choice_of(request(), nodes)
    assert served.wait_s == pytest.approx(rest_s)
    assert served.first_token_s == pytest.approx(rest_s + 0.1)
    # Those whose clients have output come first of all.
    assert choice_of(request(num_output_tokens=1, age_s=90.0), nodes).wait_s == pytest.approx(rest_s)
    for behind_all in (request(age_s=GOALS.ttft_s), batch()):
        found = admission.decide(behind_all, cluster(*nodes), GOALS, 0.0, WaitingQueue())
        assert isinstance(found, Later)
        assert found.wait_s == pytest.approx(30.0)
        assert found.wait.first_token_in_s == pytest.approx(30.1)


def test_a_wait_for_room_counts_the_prompts_that_come_before() -> None:
    """Neither late ones that are queued at the node, nor those of late requests that wait."""
    giant: dict[str, Any] = {"queued_prefill_tokens": 30_000, "interruptible_prefill_tokens": 30_000}
    nodes = [node("p0", "prefill", **giant), full_node(16)]
    state, waiting = cluster(*nodes), WaitingQueue()
    for number in range(9):
        late = request(3000, request_id=f"late{number}")
        waiting.add_waiter(late, later("d0", Work(prefill_tokens=3000), is_late=True), now=0.0)
    waiting.add_waiter(request(request_id="soon", age_s=1.0), later("d0", Work(prefill_tokens=100)), now=0.0)
    costs = RequestCosts(request(), state, GOALS, 0.0)
    found = admission.foresee_room(costs, waiting, waiting.place_of(request(), 0.0))
    assert found is not None
    assert found.wait_s == pytest.approx(TOKEN_BUDGET / 2 / 1000 + 0.1)


@pytest.mark.parametrize(("age_s", "num_interruptible"), [(0.0, 0), (GOALS.ttft_s, 100)])
def test_a_choice_counts_as_its_report_will(age_s: float, num_interruptible: int) -> None:
    wanted = request(age_s=age_s)
    for_prefill, _ = choice_of(wanted, PAIR).added_work(wanted, OutputLengths())
    assert for_prefill == Work(
        prefill_tokens=100,
        prefill_attended=100 * 101 // 2,
        interruptible_tokens=num_interruptible,
        interruptible_attended=num_interruptible * 101 // 2,
    )


def test_a_wait_for_room_is_late_when_its_first_token_is() -> None:
    few = OutputForecast(tokens_left=16 * 8.0, first_ends_in=1.0, stop_rate=1 / 256)
    many = msgspec.structs.replace(few, tokens_left=16 * 300.0, first_ends_in=200.0)
    for forecast, is_late in ((few, False), (many, True)):
        full = node("d0", "decode", num_running=16, num_blocks=9000, free=8000, forecast=forecast)
        found = admission.decide(request(), cluster(PAIR[0], full), GOALS, 0.0, WaitingQueue())
        assert isinstance(found, Later)
        assert found.is_late == is_late


def test_a_late_request_gets_no_room_before_one_in_time() -> None:
    """Though it is much older: the last place in the batch is for the one in time."""
    late, soon = request(request_id="late", age_s=30.0), request(request_id="soon", age_s=1.0)
    waiting = WaitingQueue()
    waiting.add_waiter(late, later(is_late=True), now=0.0)
    waiting.add_waiter(soon, later(), now=0.0)
    nodes = [PAIR[0], full_node(15)]
    assert isinstance(decide(late, nodes, waiting), Wait)
    assert isinstance(decide(soon, nodes, waiting), Choice)
    # A newcomer that can be in time comes before the late one too, and gets no room of others in time.
    assert isinstance(decide(request(request_id="new"), nodes, waiting), Wait)
    waiting.forget("soon")
    assert isinstance(decide(request(request_id="new"), nodes, waiting), Choice)
    assert isinstance(decide(late, nodes, waiting), Choice)


def test_late_requests_wait_for_the_prompts_of_those_before_them() -> None:
    """So what they are told is true, and one that would wait for too long is refused at once."""
    state, waiting = cluster(*behind(10.0)), WaitingQueue()
    foreseen = []
    for number in range(51):
        wanted = request(1000, request_id=f"r{number:02}")
        found = admission.decide(wanted, state, GOALS, 0.0, waiting)
        assert isinstance(found, Later)
        waiting.add_waiter(wanted, found, now=0.0)
        foreseen.append(found.wait.first_token_in_s)
    assert foreseen == pytest.approx([11.0 + number for number in range(51)])
    with pytest.raises(errors.Full) as caught:  # the last prompt begins after 60 s
        admission.decide(request(1000, request_id="r51"), state, GOALS, 0.0, waiting)
    assert caught.value.retry_after_s == pytest.approx(1.0)


def test_late_requests_are_served_in_order() -> None:
    """Whichever asks first when the prefill node is idle."""
    state, waiting = cluster(*behind(10.0)), WaitingQueue()
    late = [request(1000, request_id=name, age_s=age_s) for name, age_s in (("a", 9.0), ("b", 8.0))]
    for wanted in late:
        found = admission.decide(wanted, state, GOALS, 0.0, waiting)
        assert isinstance(found, Later)
        waiting.add_waiter(wanted, found, now=0.0)
    assert isinstance(decide(late[1], PAIR, waiting), Wait)
    assert isinstance(decide(request(1000, request_id="new", age_s=7.0), PAIR, waiting), Wait)
    assert isinstance(decide(late[0], PAIR, waiting), Choice)
    waiting.forget("a")
    assert isinstance(decide(late[1], PAIR, waiting), Choice)


def test_a_late_request_waits_for_none_that_waits_for_room_or_for_another_model() -> None:
    """They would take long to go, and the prefill node is idle meanwhile."""
    waiting = WaitingQueue()
    need = Work(3000, 1, 191, 3000, 50.0)
    waiting.add_waiter(request(3000, request_id="a", age_s=9.0), later("d1", need, is_late=True), now=0.0)
    other = request(3000, request_id="b", age_s=9.0, fingerprint="g")
    found = admission.foresee_idle_prefill(
        RequestCosts(other, cluster(*PAIR), GOALS, 0.0),
        waiting,
        waiting.place_of(other, 0.0),
        choice_of(request(3000), PAIR),
    )
    waiting.add_waiter(other, found._replace(is_late=True), now=0.0)
    full = node("d1", "decode", free=0, num_running=9)
    assert isinstance(decide(request(request_id="c", age_s=8.0), [*PAIR, full], waiting), Choice)


def test_late_newcomers_are_refused_while_a_late_request_is_overdue() -> None:
    waiting = WaitingQueue()
    first = request(request_id="first", age_s=10.0)
    waiting.add_waiter(first, later(first_token_in_s=2.0, is_late=True), now=-2.0 * WAIT_ERROR)
    waits = admission.decide(request(), cluster(*behind(10.0)), Goals(), 0.0, waiting)
    assert isinstance(waits, Later)  # not overdue yet
    waiting.forget("first")
    waiting.add_waiter(first, later(first_token_in_s=2.0, is_late=True), now=-2.0 * WAIT_ERROR - 0.1)
    # To be told again to wait makes it no less overdue.
    waiting.add_waiter(first, later(first_token_in_s=9.0, is_late=True), now=-0.05)
    with pytest.raises(errors.Full, match="others that are late") as caught:
        admission.decide(request(), cluster(*behind(10.0)), Goals(), 0.0, waiting)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    # Who sets a longest wait gets it.
    patient = Goals(max_wait_s=3600.0)
    assert isinstance(admission.decide(request(), cluster(*behind(10.0)), patient, 0.0, waiting), Later)
    # Others are not: one in time, with a pair or without; one that is served at once, that waits, that runs.
    assert isinstance(decide(request(), behind(1.0), waiting), Choice)
    soon = OutputForecast(tokens_left=16 * 8.0, first_ends_in=1.0, stop_rate=1 / 256)
    full = node("d0", "decode", num_running=16, forecast=soon)
    assert isinstance(decide(request(), [PAIR[0], full], waiting), Wait)
    assert isinstance(decide(request(age_s=10.0), PAIR, waiting), Choice)
    assert isinstance(decide(first, behind(10.0), waiting), Wait)
    assert isinstance(decide(request(num_output_tokens=1), behind(10.0), waiting), Choice)


def test_late_newcomers_are_not_refused_for_those_of_another_model() -> None:
    waiting = WaitingQueue()
    other = request(request_id="o", age_s=10.0, fingerprint="another")
    for now in (-1.0, -0.05):
        waiting.add_waiter(other, later(first_token_in_s=0.0, is_late=True), now=now)
    assert waiting.is_late_overdue("another", 0.0)
    assert isinstance(admission.decide(request(), cluster(*behind(10.0)), Goals(), 0.0, waiting), Later)


def test_a_request_in_time_that_is_overdue_keeps_no_late_one_out() -> None:
    waiting = WaitingQueue()
    waiting.add_waiter(request(request_id="first"), later(first_token_in_s=0.1), now=-1.0)
    assert isinstance(decide(request(), behind(10.0), waiting), Wait)


@pytest.mark.parametrize("max_wait_s", [0.0, 20.0])
def test_no_newcomer_is_refused_that_waits_for_the_longest_wait_at_most(max_wait_s: float) -> None:
    goals = Goals(ttft_s=2.0, max_wait_s=max_wait_s)
    longest_s = max_wait_s or 24.0
    assert goals.longest_wait_s == longest_s
    for queued_s in (0.0, 1.0, 5.0, longest_s - 0.1):
        admission.decide(request(), cluster(*behind(queued_s)), goals, 0.0, WaitingQueue())
        aged = request(age_s=longest_s - queued_s - 0.1)
        admission.decide(aged, cluster(*behind(queued_s)), goals, 0.0, WaitingQueue())
    with pytest.raises(errors.Full, match=f"at most {longest_s:.1f} s"):
        admission.decide(request(), cluster(*behind(longest_s + 0.1)), goals, 0.0, WaitingQueue())


# --- room ------------------------------------------------------------------------------------------


def test_of_many_full_nodes_one_that_waits_finds_the_soonest_though_it_asks_few_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, room_in_s = list[str](), admission._room_in_s

    def counted(one: NodeView, costs: RequestCosts, ahead: Work) -> float:
        asked.append(one.node_id)
        return room_in_s(one, costs, ahead)

    monkeypatch.setattr(admission, "_room_in_s", counted)
    ends_in = {f"d{number:02}": 10.0 if number == 37 else 1000.0 + number for number in range(64)}
    nodes = [
        node(name, "decode", num_running=16, forecast=OutputForecast(16.0 * steps, steps, 1 / 256))
        for name, steps in ends_in.items()
    ]
    state, waiting = cluster(PAIR[0], *nodes), WaitingQueue()
    stood_at, nums_asked = list[str](), list[int]()
    for now in (0.01 * number for number in range(100)):
        asked.clear()
        found = admission.decide(request(age_s=now), state, Goals(ttft_s=1e6), now, waiting)
        assert isinstance(found, Later)
        waiting.add_waiter(request(age_s=now), found, now)
        stood_at.append(found.node_id)
        nums_asked.append(len(asked))
    assert (nums_asked[0], max(nums_asked[1:])) == (NUM_FORESEEN, NUM_FORESEEN_AGAIN + 1)
    assert stood_at[0] != "d37" == stood_at[-1]
    assert [ends_in[name] for name in stood_at] == sorted((ends_in[name] for name in stood_at), reverse=True)


@pytest.mark.parametrize("idle", ["p07", "p49"])
def test_of_many_prefill_nodes_the_soonest_of_each_speed_is_foreseen(idle: str) -> None:
    """As when there are few. The first ten compute a prompt in a tenth of the time."""
    fit = StepFit(
        base_s=0.02, prefill_token_s=1e-4, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
    )
    nodes = [
        node(
            name := f"p{number:02}",
            "prefill",
            queued_prefill_tokens=0 if name == idle else 40_000,
            step=msgspec.structs.replace(fit, prefill_token_s=1e-4 if number < 10 else 1e-3),
        )
        for number in range(50)
    ]
    full = node("d0", "decode", free=0)
    alone, among = (
        decide(request(), [*prefill, full])
        for prefill in ([one for one in nodes if one.node_id == idle], nodes)
    )
    assert isinstance(alone, Wait)
    assert isinstance(among, Wait)
    assert 0.0 < among.first_token_in_s <= alone.first_token_in_s < 4.0  # a queue takes 4 s at least


def lengths_seen(mean: float) -> OutputForecast:
    """A node's forecast after many outputs of that length, for prompts of any."""
    return OutputForecast(
        tokens_left=0.0,
        first_ends_in=0.0,
        stop_rate=1 / mean,
        by_length=dict.fromkeys(range(1, 14), (1000.0, 1000.0 * mean)),
    )


@pytest.mark.parametrize(("mean", "num_blocks"), [(1.0, 7), (200.0, 7 + 12), (1e6, 7 + 62)])
def test_room_is_for_the_prompt_and_the_output_that_is_expected(mean: float, num_blocks: int) -> None:
    """100 tokens, and of 1000 at most as many as outputs had lately."""
    for free, has_room in ((num_blocks, True), (num_blocks - 1, False)):
        tight = node("d0", "decode", num_running=1, free=free, forecast=lengths_seen(mean))
        found = admission.decide(request(100, 1000), cluster(PAIR[0], tight), GOALS, 0.0, WaitingQueue())
        assert isinstance(found, Choice) == has_room
        if isinstance(found, Later):
            assert found.need.num_blocks == num_blocks


def test_room_is_left_for_what_running_sequences_will_grow() -> None:
    growing = OutputForecast(tokens_left=16 * 20.0, first_ends_in=5.0, stop_rate=1 / 256)
    for free, has_room in ((NUM_NEEDED + 20, True), (NUM_NEEDED + 19, False)):
        tight = node("d0", "decode", num_running=4, free=free, forecast=growing)
        assert isinstance(decide(request(), [PAIR[0], tight]), Choice) == has_room


def test_room_is_left_for_what_given_sequences_will_grow() -> None:
    """A choice takes its prompt's 7 blocks at once, and the room for its output too."""
    for free, has_room in ((NUM_NEEDED + 7 + 2, True), (NUM_NEEDED + 7 + 1, False)):
        one = Work(num_sequences=1, num_blocks=7, context_tokens=100, output_tokens=45.0)
        tight = node("d0", "decode", free=free, given=one)
        assert isinstance(decide(request(), [PAIR[0], tight]), Choice) == has_room


@given(st.integers(1, 4095), st.integers(1, 4095), st.sampled_from([1.0, 30.0, 1e3, 1e6]))
def test_what_an_empty_pool_can_hold_always_finds_room_there(
    num_prompt: int, max_new: int, mean: float
) -> None:
    """However long outputs are expected to become."""
    nodes = [
        node("p0", "prefill", forecast=lengths_seen(mean)),
        node("d0", "decode", forecast=lengths_seen(mean)),
    ]
    wanted = request(num_prompt, min(max_new, 4096 - num_prompt))
    assert isinstance(decide(wanted, nodes), Choice)


# --- goals of requests, the class batch ------------------------------------------------------------


def test_a_requests_own_ttft_goal_decides_whether_it_is_in_time_and_how_long_it_may_wait() -> None:
    goals, queue = Goals(), WaitingQueue()
    for goal_s, is_served in ((1.9 / IN_TIME, False), (2.3 / IN_TIME, True)):
        found = admission.decide(request(ttft_goal_s=goal_s), cluster(*behind(2.0)), goals, 0.0, queue)
        assert isinstance(found, Choice) == is_served
    patient = request(ttft_goal_s=60.0)
    for wanted, is_admitted in ((request(), False), (patient, True)):
        full = [node("p0", "prefill"), node("d0", "decode", num_running=16)]
        aged = msgspec.structs.replace(wanted, age_s=WAIT_ERROR * goals.longest_wait_s + 1.0)
        if is_admitted:
            assert isinstance(admission.decide(aged, cluster(*full), goals, 0.0, queue), Later)
        else:
            with pytest.raises(errors.Full, match="at most 60.0 s"):
                admission.decide(aged, cluster(*full), goals, 0.0, queue)


LOADED_FIT = StepFit(
    base_s=0.02, prefill_token_s=1e-3, attended_token_s=0.0, sequence_s=0.02, context_token_s=0.0
)


@pytest.mark.parametrize(
    ("own_s", "num_running", "has_room"),
    [
        (0.0, 10, True),  # a step of 240 ms, the cluster's target is 250
        (0.0, 11, False),
        (1.0, 11, False),  # a looser goal must not spoil those of others
        (0.1, 3, True),
        (0.1, 4, False),
        (0.03, 10, True),  # not even alone: 40 ms
        (0.03, 11, False),
    ],
)
def test_the_stricter_itl_goal_counts_if_it_can_be_met(
    own_s: float, num_running: int, has_room: bool
) -> None:
    busy = node("d0", "decode", num_running=num_running, step=LOADED_FIT)
    found = decide(request(itl_goal_s=own_s), [PAIR[0], busy])
    assert isinstance(found, Choice) == has_room


def test_an_itl_target_that_no_node_can_meet_keeps_none_out() -> None:
    slow = msgspec.structs.replace(LOADED_FIT, base_s=0.3)
    busy = node("d0", "decode", num_running=3, step=slow)
    assert isinstance(decide(request(), [PAIR[0], busy]), Choice)
    # One node can: then the slow one gets no more than one at a time.
    full = node("d1", "decode", num_running=16, step=LOADED_FIT)
    assert isinstance(decide(request(), [PAIR[0], busy, full]), Wait)


def test_a_request_for_one_token_needs_no_place_at_a_decode_node() -> None:
    found = choice_of(request(100, 1), [PAIR[0], node("d0", "decode", free=0, num_running=16)])
    assert (found.prefill.node_id, found.decode.node_id) == ("p0", "p0")
    assert found.predicted_s == found.first_token_s
    _, for_decode = found.added_work(request(100, 1), cluster(*PAIR).lengths_of("f"))
    assert for_decode == Work()


def batch(request_id: str = "batch", **changes: Any) -> ScheduleRequest:
    return request(request_id=request_id, is_batch=True, **changes)


def test_a_batch_request_is_served_when_a_prefill_node_is_idle_and_no_other_waits() -> None:
    assert isinstance(decide(batch(), behind(IDLE_S)), Choice)
    assert isinstance(decide(batch(), behind(IDLE_S + 0.1)), Wait)  # though it would be in time
    waiting = WaitingQueue()
    late = request(request_id="late", age_s=9.0)
    waiting.add_waiter(late, later("d1", is_late=True), now=0.0)
    assert isinstance(decide(batch(age_s=500.0), PAIR, waiting), Wait)
    waiting.forget("late")
    waiting.add_waiter(request(request_id="other", fingerprint="g"), later("d1"), now=0.0)
    assert isinstance(decide(batch(), PAIR, waiting), Choice)


def test_batch_requests_are_served_in_order() -> None:
    state, waiting = cluster(*behind(10.0)), WaitingQueue()
    for name, age_s in (("a", 2.0), ("b", 1.0)):
        wanted = batch(name, num_prompt_tokens=1000, age_s=age_s)
        found = admission.decide(wanted, state, GOALS, 0.0, waiting)
        assert isinstance(found, Later)
        assert not found.is_late
        waiting.add_waiter(wanted, found, now=0.0)
    assert isinstance(decide(batch("b", num_prompt_tokens=1000, age_s=1.0), PAIR, waiting), Wait)
    assert isinstance(decide(batch("a", num_prompt_tokens=1000, age_s=2.0), PAIR, waiting), Choice)


def test_no_request_exceeds_the_itl_target_of_others() -> None:
    """However long it has waited. But one whose client has seen half of the answer."""
    for num_running, has_room in ((10, True), (11, False)):
        busy = node("d0", "decode", num_running=num_running, step=LOADED_FIT)
        retry = request(num_output_tokens=1)
        for wanted in (batch(age_s=500.0), request(age_s=GOALS.longest_wait_s - 2.0), retry):
            found = decide(wanted, [PAIR[0], busy])
            assert isinstance(found, Choice) == (has_room or wanted is retry)


def test_batch_requests_that_wait_are_in_nobodys_way() -> None:
    """Others predict the same waits, find the same room, and are not refused for a batch that is overdue."""
    nodes = [PAIR[0], full_node(16)]
    alone = admission.decide(request(), cluster(*nodes), GOALS, 0.0, WaitingQueue())
    waiting = WaitingQueue()
    for number in range(9):
        wanted = batch(f"b{number}", age_s=100.0)
        found = admission.decide(wanted, cluster(*nodes), GOALS, -9.0, waiting)
        assert isinstance(found, Later)
        waiting.add_waiter(wanted, found, now=0.0)
    assert admission.decide(request(), cluster(*nodes), GOALS, 0.0, waiting) == alone
    assert isinstance(decide(request(), [PAIR[0], full_node(15)], waiting), Choice)
    assert not waiting.is_late_overdue("f", 1e9)


def test_a_batch_request_is_refused_for_its_deadline_and_when_too_many_wait() -> None:
    waiting, nodes = WaitingQueue(), behind(50.0)
    assert isinstance(decide(batch(age_s=1000.0), nodes), Wait)  # not for its age
    with pytest.raises(errors.Full, match="left"):
        decide(batch(deadline_in_s=40.0), nodes)
    for number in range(admission.MAX_BATCH_WAITING):
        waiting.add_waiter(batch(f"b{number}"), later("d0"), now=0.0)
    with pytest.raises(errors.Full, match="256 requests of the class batch wait"):
        decide(batch(), nodes, waiting)
    assert isinstance(decide(batch("b0"), nodes, waiting), Wait)


def test_what_is_due_at_the_prefill_node_follows_the_order_of_service() -> None:
    """But late ones are due one day, so that none starves there."""
    wanted = {
        "running": request(num_output_tokens=1),
        "old": request(age_s=1.0),
        "urgent": request(priority=-1),
        "new": request(),
        "strict": request(ttft_goal_s=2.0),
        "late": request(age_s=6.0),
        "batch": batch(deadline_in_s=300.0),
    }
    choices = {name: choice_of(one, PAIR) for name, one in wanted.items()}
    due = {name: choice.due_in_s for name, choice in choices.items()}
    # What nodes promise of these is not held against them.
    interruptible = {
        name: choice.interruptible_for_s for name, choice in choices.items() if choice.interruptible_for_s
    }
    # Until a newcomer would be due as late.
    assert interruptible == {"late": due["late"] - GOALS.ttft_s, "batch": 300.0 - GOALS.ttft_s}
    assert due == {
        "running": 0.0,
        "old": 4.0,
        "urgent": -5.0,
        "new": 5.0,
        "strict": 2.0,
        "late": -1.0 + 60.0,
        "batch": 300.0,
    }


def test_room_for_those_ahead_goes_by_their_own_goals() -> None:
    """Not by the strict one of the request that asks: the one ahead could take the place now."""
    busy = node("d0", "decode", num_running=9, max_num_seqs=10, step=LOADED_FIT)
    waiting = waiting_behind([request(request_id="first", age_s=1.0)])
    full = node("d1", "decode", num_running=1, max_num_seqs=1, step=LOADED_FIT)
    idle = node("d2", "decode", max_num_seqs=1, step=LOADED_FIT)
    strict = request(request_id="second", itl_goal_s=0.1)
    found = decide(strict, [PAIR[0], busy, full, idle], waiting)
    assert isinstance(found, Choice)
    assert found.decode.node_id == "d2"
