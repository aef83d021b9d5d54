"""What the planner adds to its parts."""

from __future__ import annotations

import msgspec

from flowkv_common.wire.messages import Wait
from flowkv_common.wire.nodes import SetPrefillCap, StepFit
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import Choice
from tests.described_nodes import CAPS, TOKEN_BUDGET, descriptor, report, request


def test_a_lent_node_is_forgotten_when_it_leaves_the_registry_not_when_it_is_silent() -> None:
    planner = Planner(Goals())
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    nodes = {name: descriptor(name, role) for name, role in roles.items()}
    planner.set_descriptors(nodes)
    for name, role in roles.items():
        cap = TOKEN_BUDGET if name == "d0" else CAPS[role]
        planner.add_report(report(name, role, max_prefill_tokens_per_step=cap), 0.0)
    planner.tick(0.0)
    assert planner.rebalancer.leaving == {"d0": "decode"}
    planner.tick(9.0)  # all are silent
    assert planner.rebalancer.leaving == {"d0": "decode"}
    planner.set_descriptors({name: nodes[name] for name in ("p0", "d1")})
    assert planner.rebalancer.leaving == {}
    assert planner.rebalancer.moved == {}


def test_prompts_that_come_at_once_to_one_node_wait_for_each_other_and_are_not_refused() -> None:
    """A chunk beside decode takes longer than the goal here: they take turns, one prompt at a time."""
    planner = Planner(Goals())
    planner.set_descriptors({"m0": descriptor("m0", "mixed", num_blocks=1456)})
    core = StepFit(
        base_s=0.02, prefill_token_s=0.0011, attended_token_s=2e-7, sequence_s=0.0012, context_token_s=1e-6
    )
    load = report("m0", "mixed", free=1456, max_prefill_tokens_per_step=256, max_num_seqs=64, step=core)
    planner.add_report(load, 0.0)
    wanted = [msgspec.structs.replace(request(512, 64), request_id=f"r{number}") for number in range(16)]
    first, *others = [planner.schedule(each, 0.1) for each in wanted]
    assert isinstance(first, Choice)
    assert all(isinstance(other, Wait) and other.retry_in_s <= 0.5 for other in others)


def test_the_planner_counts_what_prompts_will_produce() -> None:
    """Twenty prompts of a few tokens, and long answers: decode is short before it has begun."""
    planner = Planner(Goals())
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
    planner.set_descriptors({name: descriptor(name, role) for name, role in roles.items()})
    fit = StepFit(
        base_s=0.02, prefill_token_s=1e-4, attended_token_s=0.0, sequence_s=0.01, context_token_s=0.0
    )
    for name, role in roles.items():
        planner.add_report(report(name, role, step=fit, max_num_seqs=64), 0.0)
    for number in range(8):
        wanted = msgspec.structs.replace(request(16, 2000), request_id=f"r{number}")
        assert isinstance(planner.schedule(wanted, 0.0), Choice)
    told = [planner.tick(0.5), planner.tick(1.0)]
    assert any(isinstance(order, SetPrefillCap) for orders in told for order in orders)
