"""Which pair the policy takes, case by case."""

from __future__ import annotations

import pytest
from imagined_nodes import BLOCK_SIZE, descriptor, report, request, view

from flowkv_scheduler.policy import (
    Choice,
    added_work,
    choose,
    decode_cost,
    prefill_cost,
    room_in_s,
    transfer_s,
)
from flowkv_scheduler.state import NodeView, Work


def pair(choice: Choice | None) -> tuple[str, str] | None:
    return choice and (choice.prefill.node_id, choice.decode.node_id)


def test_sides_follow_the_prefill_cap() -> None:
    assert pair(choose(request(), [view("a", "decode"), view("b", "prefill")])) == ("b", "a")


def test_mixed_node_serves_both_sides_and_saves_the_transfer() -> None:
    nodes = [view("a", "prefill"), view("m", "mixed"), view("z", "decode")]
    assert pair(choose(request(), nodes)) == ("m", "m")


def test_side_without_nodes_is_taken_by_the_others() -> None:
    assert pair(choose(request(), [view("p", "prefill")])) == ("p", "p")
    assert pair(choose(request(), [view("d", "decode")])) == ("d", "d")


def test_queued_tokens_send_the_prompt_elsewhere() -> None:
    nodes = [view("p0", "prefill", queued_prefill_tokens=500), view("p1", "prefill"), view("d0", "decode")]
    assert pair(choose(request(), nodes)) == ("p1", "d0")


def test_unlike_nodes_are_known_by_their_rates() -> None:
    fast = view("p1", "prefill", prefill_tokens_per_s=8000.0, queued_prefill_tokens=2000)
    nodes = [view("p0", "prefill"), fast, view("d0", "decode")]
    assert pair(choose(request(num_prompt_tokens=1000), nodes)) == ("p1", "d0")
    assert pair(choose(request(num_prompt_tokens=10), nodes)) == ("p0", "d0")


def test_own_choices_count_before_a_report_shows_them() -> None:
    given = view("p0", "prefill", given=Work(prefill_tokens=100))
    assert pair(choose(request(), [given, view("p1", "prefill"), view("d0", "decode")])) == ("p1", "d0")
    busy = view("d0", "decode", given=Work(num_sequences=1))
    assert pair(choose(request(), [view("p0", "prefill"), busy, view("d1", "decode")])) == ("p0", "d1")


def test_node_without_blocks_for_the_prompt_is_passed_over() -> None:
    nodes = [view("p0", "prefill"), view("d0", "decode", free=6), view("d1", "decode", num_running=9)]
    assert pair(choose(request(num_prompt_tokens=100), nodes)) == ("p0", "d1")
    assert choose(request(num_prompt_tokens=100), nodes[:2]) is None
    assert pair(choose(request(num_prompt_tokens=95), nodes[:2])) == ("p0", "d0")


def test_blocks_given_away_are_not_given_again() -> None:
    nodes = [view("p0", "prefill"), view("d0", "decode", free=10, given=Work(num_blocks=5))]
    assert choose(request(num_prompt_tokens=100), nodes) is None


def test_pool_too_small_for_the_whole_request_is_passed_over() -> None:
    nodes = [view("p0", "prefill"), view("d0", "decode", num_blocks=8), view("d1", "decode", num_running=9)]
    assert pair(choose(request(num_prompt_tokens=100, max_new_tokens=200), nodes)) == ("p0", "d1")


def test_full_batch_is_a_wait() -> None:
    nodes = [
        view("p0", "prefill"),
        view("d0", "decode", num_running=16),
        view("d1", "decode", num_running=15),
    ]
    assert pair(choose(request(), nodes)) == ("p0", "d1")
    assert decode_cost(nodes[1]).wait_s > 0 == decode_cost(nodes[2]).wait_s


@pytest.mark.parametrize("changes", [{"ready": False}, {"draining": True}, {"age_s": 10.0}])
def test_unusable_node_is_never_taken(changes: dict[str, float]) -> None:
    nodes = [view("d0", "decode", **changes), view("d1", "decode", num_running=12), view("p0", "prefill")]
    assert pair(choose(request(), nodes)) == ("p0", "d1")
    assert choose(request(), nodes[:1]) is None


def test_node_that_failed_the_request_is_avoided_while_there_are_others() -> None:
    nodes = [view("p0", "prefill"), view("p1", "prefill", queued_prefill_tokens=900), view("d0", "decode")]
    assert pair(choose(request(avoid=["p0"]), nodes)) == ("p1", "d0")
    assert pair(choose(request(avoid=["p0", "p1", "d0"]), nodes)) == ("p0", "d0")


def test_only_equal_layouts_and_weights_are_paired() -> None:
    other = NodeView(descriptor("p0", "prefill", head_dim=32), report("p0", "prefill"), 0.0)
    nodes = [other, view("p1", "prefill", queued_prefill_tokens=900), view("d0", "decode")]
    assert pair(choose(request(), nodes)) == ("p1", "d0")


def test_prediction_is_the_sum_of_its_parts() -> None:
    p = view("p0", "prefill", queued_prefill_tokens=300, given=Work(prefill_tokens=200))
    d = view("d0", "decode", num_running=8)
    choice = choose(request(num_prompt_tokens=100), [p, d])
    assert choice is not None
    bytes_moved = 7 * 2 * 2 * BLOCK_SIZE * 2 * 16 * 4  # blocks, layers, K and V, slots, heads, head_dim, fp32
    assert transfer_s(request(), p, d) == pytest.approx(bytes_moved / 1e9)
    assert choice.predicted_s == pytest.approx(0.5 + 0.1 + bytes_moved / 1e9 + 0.03 * 1.5)
    assert choice.wait_s == pytest.approx(0.5)
    assert prefill_cost(request(num_prompt_tokens=100), p).total_s == pytest.approx(0.6)


def test_unmeasured_node_is_taken_to_be_middling() -> None:
    fresh = view("p0", "prefill", prefill_tokens_per_s=0.0)
    assert prefill_cost(request(num_prompt_tokens=1000), fresh).total_s == pytest.approx(1.0)
    assert decode_cost(view("d0", "decode", decode_step_s=0.0)).total_s == pytest.approx(0.03)


def test_candidates_are_the_best_eight_of_each_side_in_order() -> None:
    nodes = [view(f"p{n}", "prefill", queued_prefill_tokens=100 * n) for n in range(9)]
    choice = choose(request(), [*reversed(nodes), view("d0", "decode")])
    assert choice is not None
    assert [c.node_id for c in choice.prefill_candidates] == [f"p{n}" for n in range(8)]
    assert [c.node_id for c in choice.decode_candidates] == ["d0"]
    assert choice.prefill_candidates[1].reason == "100 tokens ahead at 1000 tokens/s"
    assert "best of 9 pairs" in choice.reason


def test_choice_adds_tokens_to_prefill_and_blocks_to_decode() -> None:
    choice = choose(request(num_prompt_tokens=96), [view("p0", "prefill"), view("d0", "decode")])
    assert choice is not None
    assert added_work(request(num_prompt_tokens=96), choice) == (Work(prefill_tokens=96), Work(0, 1, 7))


def test_room_comes_sooner_the_less_is_missing() -> None:
    wanted = request(num_prompt_tokens=400)
    waits = [room_in_s(wanted, view("d0", "decode", free=free)) for free in (26, 25, 10, 0)]
    assert waits[0] == 0.0
    assert waits == sorted(waits)
    assert 0.0 < waits[1] < waits[2] < waits[3]
