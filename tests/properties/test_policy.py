"""What holds for every cluster and every request."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from imagined_nodes import CAPS, NUM_BLOCKS, request, view

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_scheduler.policy import Choice, choose, decode_cost, prefill_cost
from flowkv_scheduler.state import NodeView, Work


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeView]:
    """Up to six nodes in any state, of few distinct loads so that ties are common."""
    few = st.sampled_from
    return [
        view(
            f"n{number}",
            draw(few(sorted(CAPS))),
            age_s=draw(few([0.0, 0.4, 9.0])),
            given=Work(draw(few([0, 64])), draw(few([0, 1])), draw(few([0, 8]))),
            ready=draw(few([True, True, True, False])),
            draining=draw(few([False, False, False, True])),
            queued_prefill_tokens=draw(few([0, 64, 4000])),
            num_running=draw(few([0, 1, 16])),
            free=draw(few([0, 12, NUM_BLOCKS])),
            prefill_tokens_per_s=draw(few([0.0, 500.0, 4000.0])),
            decode_step_s=draw(few([0.0, 0.01, 0.1])),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


requests = st.builds(
    lambda num_prompt, num_new, avoid: request(num_prompt, num_new, avoid=avoid),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.lists(st.sampled_from(["n0", "n1", "n2"]), max_size=2),
)


def pair(choice: Choice | None) -> tuple[str, str] | None:
    return choice and (choice.prefill.node_id, choice.decode.node_id)


@given(clusters(), requests)
def test_unusable_nodes_are_never_chosen(nodes: list[NodeView], wanted: ScheduleRequest) -> None:
    choice = choose(wanted, nodes)
    if choice is None:
        return
    for node in (choice.prefill, choice.decode):
        assert node.report.ready
        assert not node.report.draining
        assert node.age_s <= 3 * node.report.period_s
        assert node.node_id not in wanted.avoid or all(
            n.node_id in wanted.avoid for n in nodes if n.is_usable
        )
    num_blocks = -(-(wanted.num_prompt_tokens + 1) // 16)
    counts = choice.decode.report.blocks
    assert num_blocks <= counts.free + counts.cached - choice.decode.given.num_blocks


@given(clusters(), requests, st.randoms())
def test_order_of_nodes_changes_nothing(nodes: list[NodeView], wanted: ScheduleRequest, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert choose(wanted, shuffled) == choose(wanted, nodes)


@given(clusters(), requests)
def test_no_other_candidates_promise_less(nodes: list[NodeView], wanted: ScheduleRequest) -> None:
    choice = choose(wanted, nodes)
    if choice is None:
        return
    for p in nodes:
        for d in nodes:
            alone = choose(wanted, [p, d])
            if alone is not None and pair(alone) == (p.node_id, d.node_id) and _on_same_sides(choice, p, d):
                assert choice.predicted_s <= alone.predicted_s


def _on_same_sides(choice: Choice, p: NodeView, d: NodeView) -> bool:
    return p.node_id in {c.node_id for c in choice.prefill_candidates} and d.node_id in {
        c.node_id for c in choice.decode_candidates
    }


loads = st.sampled_from(
    ["queued_prefill_tokens", "num_running", "num_waiting", "decode_step_s", "free", "given"]
)


def loaded(node: NodeView, load: str, by: int) -> NodeView:
    """The same node with more to do."""
    if load == "given":
        return node._replace(given=Work(*(have + by for have in node.given)))
    if load == "free":
        blocks = node.report.blocks
        less = msgspec.structs.replace(blocks, free=blocks.free // 2, leased=blocks.total - blocks.free // 2)
        return node._replace(report=msgspec.structs.replace(node.report, blocks=less))
    more = {"decode_step_s": 0.2}.get(load) or getattr(node.report, load) + by
    return node._replace(report=msgspec.structs.replace(node.report, **{load: more}))


@given(clusters(), requests, st.data())
def test_more_load_never_makes_a_node_more_attractive(
    nodes: list[NodeView], wanted: ScheduleRequest, data: st.DataObject
) -> None:
    if not nodes:
        return
    which = data.draw(st.integers(0, len(nodes) - 1))
    busier = list(nodes)
    busier[which] = loaded(nodes[which], data.draw(loads), by=data.draw(st.sampled_from([1, 8, 700])))
    before, after = pair(choose(wanted, nodes)) or (), pair(choose(wanted, busier)) or ()
    node_id = nodes[which].node_id
    assert after.count(node_id) <= before.count(node_id)


@given(clusters(), requests, loads, st.sampled_from([1, 8, 700]))
def test_more_load_never_lowers_a_cost(
    nodes: list[NodeView], wanted: ScheduleRequest, load: str, by: int
) -> None:
    for node in nodes:
        busier = loaded(node, load, by)
        assert prefill_cost(wanted, busier).total_s >= prefill_cost(wanted, node).total_s
        assert decode_cost(busier).total_s >= decode_cost(node).total_s
