"""What the planner adds to its parts."""

from __future__ import annotations

from imagined_nodes import TOKEN_BUDGET, descriptor, report

from flowkv_scheduler.planner import Planner
from flowkv_scheduler.weighing import Goals


def test_a_lent_node_is_forgotten_when_it_leaves_the_registry_not_when_it_is_silent() -> None:
    planner = Planner(Goals())
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    nodes = {name: descriptor(name, role) for name, role in roles.items()}
    planner.set_descriptors(nodes)
    for name, role in roles.items():
        cap = {"max_prefill_tokens_per_step": TOKEN_BUDGET} if name == "d0" else {}
        planner.add_report(report(name, role, **cap), 0.0)
    planner.tick(0.0)
    assert planner.regimes.leaving == {"d0": "decode"}
    planner.tick(9.0)  # all are silent
    assert planner.regimes.leaving == {"d0": "decode"}
    planner.set_descriptors({name: nodes[name] for name in ("p0", "d1")})
    assert planner.regimes.leaving == planner.regimes.lent == {}
