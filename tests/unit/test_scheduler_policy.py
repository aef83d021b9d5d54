"""Which pair the policy takes, case by case."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.nodes import PRIOR_TOKENS, StepFit, expected_tokens, num_attended
from flowkv_scheduler import policy
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.node_view import Work
from flowkv_scheduler.policy import HANDOFF_S, RequestCosts
from tests.described_nodes import (
    BLOCK_SIZE,
    GOALS,
    MODEL,
    Described,
    choose,
    cluster,
    node,
    pair,
    request,
    view,
)

BLOCK_BYTES = 2 * 2 * BLOCK_SIZE * 2 * 16 * 4  # layers, K and V, slots, heads, head_dim, fp32


def costs_of(wanted: ScheduleRequest, *nodes: Described) -> RequestCosts:
    return RequestCosts(wanted, cluster(*nodes), GOALS, 0.0)


def test_sides_follow_the_prefill_chunk_budget() -> None:
    assert pair(choose(request(), [node("a", "decode"), node("b", "prefill")])) == ("b", "a")


def test_mixed_node_serves_both_sides_and_saves_the_transfer() -> None:
    nodes = [node("a", "prefill"), node("m", "mixed"), node("z", "decode")]
    assert pair(choose(request(), nodes)) == ("m", "m")


def test_side_without_nodes_is_taken_by_the_others() -> None:
    assert pair(choose(request(), [node("p", "prefill")])) == ("p", "p")
    assert pair(choose(request(), [node("d", "decode")])) == ("d", "d")


def test_queued_tokens_send_the_prompt_elsewhere() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=500), node("p1", "prefill"), node("d0", "decode")]
    assert pair(choose(request(), nodes)) == ("p1", "d0")


def test_unlike_nodes_are_known_by_their_rates() -> None:
    fast = node("p1", "prefill", prefill_tokens_per_s=8000.0, queued_prefill_tokens=2000)
    nodes = [node("p0", "prefill"), fast, node("d0", "decode")]
    assert pair(choose(request(num_prompt_tokens=1000), nodes)) == ("p1", "d0")
    assert pair(choose(request(num_prompt_tokens=10), nodes)) == ("p0", "d0")


def test_own_choices_count_before_a_report_shows_them() -> None:
    given = node("p0", "prefill", given=Work(prefill_tokens=100))
    assert pair(choose(request(), [given, node("p1", "prefill"), node("d0", "decode")])) == ("p1", "d0")
    busy = node("d0", "decode", given=Work(num_sequences=1))
    assert pair(choose(request(), [node("p0", "prefill"), busy, node("d1", "decode")])) == ("p0", "d1")


def test_node_without_blocks_for_the_prompt_and_its_output_is_passed_over() -> None:
    """Of the 50 tokens that it may produce 45 are expected."""
    nodes = [node("p0", "prefill"), node("d0", "decode", free=9), node("d1", "decode", num_running=9)]
    assert pair(choose(request(num_prompt_tokens=100), nodes)) == ("p0", "d1")
    assert choose(request(num_prompt_tokens=100), nodes[:2]) is None
    assert pair(choose(request(num_prompt_tokens=95), nodes[:2])) == ("p0", "d0")


def test_blocks_given_away_are_not_given_again() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", free=10, given=Work(num_blocks=5))]
    assert choose(request(num_prompt_tokens=100), nodes) is None


def test_pool_too_small_for_the_whole_request_is_passed_over() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", num_blocks=8), node("d1", "decode", num_running=9)]
    assert pair(choose(request(num_prompt_tokens=100, max_new_tokens=200), nodes)) == ("p0", "d1")


def test_full_batch_is_a_wait() -> None:
    full, nearly = node("d0", "decode", num_running=16), node("d1", "decode", num_running=15)
    assert pair(choose(request(), [node("p0", "prefill"), full, nearly])) == ("p0", "d1")
    assert choose(request(), [node("p0", "prefill"), full]) is None


def test_decode_node_over_its_rhythm_is_passed_over_unless_the_request_runs_already() -> None:
    slow = StepFit(
        base_s=0.1, prefill_token_s=0.001, attended_token_s=0.0, sequence_s=0.02, context_token_s=0.0
    )
    nodes = [node("p0", "prefill"), node("d0", "decode", step=slow, num_running=7)]
    assert pair(choose(request(), nodes, Goals(itl_s=0.27))) == ("p0", "d0")
    assert choose(request(), nodes, Goals(itl_s=0.25)) is None
    assert pair(choose(request(num_output_tokens=1), nodes, Goals(itl_s=0.25))) == ("p0", "d0")


def test_idle_decode_node_is_taken_however_slow_it_is() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", decode_step_s=2.0)]
    assert pair(choose(request(), nodes)) == ("p0", "d0")


def test_short_prompt_stays_on_an_idle_decode_node() -> None:
    base = StepFit(
        base_s=0.03, prefill_token_s=0.001, attended_token_s=0.0, sequence_s=0.002, context_token_s=0.0
    )
    nodes = [node("p0", "prefill", step=base), node("d0", "decode", step=base)]
    assert pair(choose(request(num_prompt_tokens=16), nodes)) == ("d0", "d0")
    assert pair(choose(request(num_prompt_tokens=300), nodes)) == ("p0", "d0")
    # One that computes another prompt is not idle.
    nodes[1] = node("d0", "decode", step=base, num_prompts=1)
    assert pair(choose(request(num_prompt_tokens=16), nodes)) == ("p0", "d0")


def test_node_that_has_cached_the_prefix_is_worth_a_wait() -> None:
    hashes = [f"{number:016x}" * 2 for number in range(11)]
    nodes = [node("p0", "prefill", queued_prefill_tokens=50), node("p1", "prefill"), node("d0", "decode")]
    state = cluster(*nodes)
    state.prefixes.expect([nodes[0].descriptor.node], hashes[:8], until=9.0)
    wanted = request(num_prompt_tokens=180, block_hashes=hashes)
    choice = policy.choose(RequestCosts(wanted, state, GOALS, now=0.0))
    assert choice is not None
    assert (choice.prefill.node_id, choice.num_cached_tokens) == ("p0", 128)
    assert choice.added_work(wanted, OutputLengths())[0] == Work(
        prefill_tokens=52, prefill_attended=num_attended(52, num_cached=128)
    )


def test_a_mixed_node_that_has_cached_the_prefix_is_compared_with_many_of_its_side() -> None:
    hashes = [f"{number:016x}" * 2 for number in range(248)]
    idle = [node(f"p{n}", "prefill") for n in range(9)]
    # With more to do than the four that are compared for their load.
    mixed = node("m", "mixed", queued_prefill_tokens=100, num_running=15)
    state = cluster(*idle, mixed, node("d0", "decode"))
    state.prefixes.expect([mixed.descriptor.node], hashes, until=9.0)
    wanted = request(num_prompt_tokens=3969, block_hashes=hashes)
    choice = policy.choose(RequestCosts(wanted, state, GOALS, now=0.0))
    assert choice is not None
    assert (choice.prefill.node_id, choice.num_cached_tokens) == ("m", 3968)


def test_a_prefix_that_many_decode_nodes_have_is_still_found_at_a_prefill_node() -> None:
    hashes = [f"{number:016x}" * 2 for number in range(248)]
    decode = [node(f"d{n:02}", "decode") for n in range(40)]
    having = node("p9", "prefill", queued_prefill_tokens=200)
    state = cluster(*decode, *(node(f"p{n}", "prefill") for n in range(8)), having)
    for one in (*decode, having):  # the decode nodes were heard of first
        state.prefixes.expect([one.descriptor.node], hashes, until=9.0)
    wanted = request(num_prompt_tokens=3969, block_hashes=hashes)
    choice = policy.choose(RequestCosts(wanted, state, GOALS, now=0.0))
    assert choice is not None
    assert choice.num_cached_tokens == 3968
    assert choice.prefill.node_id in {"p9", *(one.node_id for one in decode)}
    [told] = [one for one in choice.prefill_candidates if one.node_id == "p9"]
    assert "3968 of the prompt cached" in told.reason


def test_host_and_gpu_memory_are_never_paired() -> None:
    nodes = [node("p0", "prefill", memory="gpu"), node("d0", "decode")]
    choice = choose(request(), nodes)
    assert choice is not None
    assert choice.prefill.node_id == choice.decode.node_id
    nodes.append(node("d1", "decode", memory="gpu"))
    assert pair(choose(request(), nodes)) == ("p0", "d1")


@pytest.mark.parametrize("changes", [{"ready": False}, {"draining": True}, {"age_s": 10.0}])
def test_unusable_node_is_never_taken(changes: dict[str, Any]) -> None:
    nodes = [node("d0", "decode", **changes), node("d1", "decode", num_running=12), node("p0", "prefill")]
    assert pair(choose(request(), nodes)) == ("p0", "d1")
    assert choose(request(), nodes[:1]) is None


def test_node_that_failed_the_request_is_avoided_while_there_are_others() -> None:
    nodes = [node("p0", "prefill"), node("p1", "prefill", queued_prefill_tokens=90), node("d0", "decode")]
    assert pair(choose(request(avoid=["p0"]), nodes)) == ("p1", "d0")
    assert pair(choose(request(avoid=["p0", "p1", "d0"]), nodes)) == ("p0", "d0")


def test_only_equal_layouts_and_weights_are_paired() -> None:
    other = node("p0", "prefill", layout={"head_dim": 32})
    nodes = [other, node("p1", "prefill", queued_prefill_tokens=90), node("d0", "decode")]
    assert pair(choose(request(), nodes)) == ("p1", "d0")
    assert pair(choose(request(), [other])) == ("p0", "p0")


def test_prediction_is_the_sum_of_its_parts() -> None:
    nodes = [
        node("p0", "prefill", queued_prefill_tokens=300, given=Work(prefill_tokens=200), links={"d0": "tcp"}),
        node("d0", "decode", num_running=8, max_num_seqs=16),
    ]
    choice = choose(request(num_prompt_tokens=200), nodes)
    assert choice is not None
    assert pair(choice) == ("p0", "d0")
    transfer_s = HANDOFF_S + 200 / BLOCK_SIZE * BLOCK_BYTES / 1e9
    step_s = 0.03 + 9 * 0.03 / 16
    assert choice.predicted_s == pytest.approx(0.5 + 0.2 + transfer_s + step_s)
    assert choice.wait_s == pytest.approx(0.5)
    assert choice.first_token_s == pytest.approx(0.7)


def test_a_peer_that_a_report_does_not_name_is_reached_as_most_are() -> None:
    p = node("p0", "prefill", links={"d0": "shm"}, usual_connector="tcp")
    d0, d1 = node("d0", "decode"), node("d1", "decode")
    costs = costs_of(request(), p, d0, d1)
    assert [costs.link_between(view(p), view(d)) for d in (d0, d1)] == ["shm", "tcp"]


def test_transfer_hides_behind_prefill_as_far_as_the_link_keeps_up() -> None:
    tokens, token_s = 5120, BLOCK_BYTES / BLOCK_SIZE / 1e9
    p, d = node("p0", "prefill", links={"d0": "tcp"}, prefill_tokens_per_s=1e9), node("d0", "decode")
    costs = costs_of(request(num_prompt_tokens=tokens), p, d)
    prefill = costs.prefill_cost(view(p))
    assert costs.link_between(view(p), view(d)) == "tcp"
    assert costs.transfer_s(prefill, 0, "tcp") == pytest.approx(HANDOFF_S + tokens * token_s, rel=1e-2)
    slow = msgspec.structs.replace(prefill, work_s=10.0)
    assert costs.transfer_s(slow, 0, "tcp") == pytest.approx(HANDOFF_S + 512 * token_s)


def test_unmeasured_node_is_taken_to_be_middling() -> None:
    fresh = node("p0", "prefill", prefill_tokens_per_s=0.0)
    wanted = request(num_prompt_tokens=1000)
    assert costs_of(wanted, fresh).prefill_cost(view(fresh)).total_s == pytest.approx(1.0)
    idle = node("d0", "decode", decode_step_s=0.0)
    assert costs_of(wanted, idle).decode_cost(view(idle)).total_s == pytest.approx(0.03 * 17 / 16)


def test_candidates_are_the_best_four_of_each_side_in_order() -> None:
    nodes = [node(f"p{n}", "prefill", queued_prefill_tokens=100 * n) for n in range(9)]
    choice = choose(request(), [*reversed(nodes), node("d0", "decode", num_running=1)])
    assert choice is not None
    assert [c.node_id for c in choice.prefill_candidates] == [f"p{n}" for n in range(4)]
    assert [c.node_id for c in choice.decode_candidates] == ["d0"]
    assert choice.prefill_candidates[1].reason == "100 tokens queued, 0 of the prompt cached"
    assert "best of 4 pairs" in choice.reason


def test_choice_adds_tokens_to_prefill_and_blocks_to_decode() -> None:
    wanted = request(num_prompt_tokens=96)
    choice = choose(wanted, [node("p0", "prefill"), node("d0", "decode")])
    assert choice is not None
    for_prefill, for_decode = choice.added_work(wanted, OutputLengths())
    assert for_prefill == Work(prefill_tokens=96, prefill_attended=num_attended(96))
    expected = expected_tokens(wanted.max_new_tokens, 1 / PRIOR_TOKENS)
    assert for_decode == Work(0, 1, 7, 96, expected)


def test_however_long_a_request_has_waited_it_keeps_to_the_itl_target_of_others() -> None:
    fit = StepFit(
        base_s=0.02, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.04, context_token_s=0.0
    )
    nodes = [node("p0", "prefill"), node("d0", "decode", num_running=9, step=fit)]
    assert choose(request(age_s=2 * GOALS.longest_wait_s), nodes) is None
    assert pair(choose(request(num_output_tokens=1), nodes)) == ("p0", "d0")


OTHER = msgspec.structs.replace(MODEL, name="other", fingerprint="g")


def test_nodes_of_another_model_get_nothing_however_idle_they_are() -> None:
    mine = [node("p", "prefill", queued_prefill_tokens=5000), node("d", "decode", num_running=9)]
    others = [
        node("a", "prefill", model=OTHER),
        node("b", "decode", model=OTHER),
        node("c", "mixed", model=OTHER),
    ]
    assert pair(choose(request(), mine + others)) == ("p", "d")
    assert pair(choose(request(fingerprint="g"), mine + others)) == ("c", "c")
    assert pair(choose(request(), [mine[0], *others])) == ("p", "p")  # rather alone than with another model
    assert choose(request(), others) is None
    assert choose(request(fingerprint=""), mine + others) is None
