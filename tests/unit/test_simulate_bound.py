"""The linear program: by hand where that is easy, and above what the simulator makes of any policy."""

from __future__ import annotations

import pytest

from benchmarks.simulator.kinds import KINDS, default_targets, unloaded_prefill_s
from benchmarks.simulator.run import Machines, simulate
from benchmarks.traffic import MADE_UP
from flowkv.bench.traces import Request, Targets, at_rate

pytest.importorskip("scipy", reason="the bound needs the developers' extra")
from benchmarks.simulator.bound import most_good

L40S = KINDS["l40s"]
ONE_S = unloaded_prefill_s(L40S, L40S.token_budget)  # a full step


def test_prompts_are_good_as_far_as_their_work_fits_before_they_are_due() -> None:
    prompts = [Request(L40S.token_budget, 1)] * 10
    for num_nodes, windows in ((1, 3.0), (2, 3.0), (1, 20.0)):
        targets = Targets(windows * ONE_S, 1.0)
        found = most_good(Machines(L40S, num_nodes), prompts, targets)
        assert found == pytest.approx(min(10, num_nodes * windows))


def test_prompts_of_one_moment_wait_for_no_window_that_has_passed() -> None:
    """Two bunches, far apart: what the first does not get is lost."""
    targets = Targets(2 * ONE_S, 1.0)
    bunches = [Request(L40S.token_budget, 1, (), at * 100 * ONE_S) for at in (0, 1) for _ in range(5)]
    assert 4 <= most_good(Machines(L40S, 1), bunches, targets) <= 6  # windows count with whole slots


def test_a_prompt_that_no_idle_node_does_in_time_is_never_good() -> None:
    targets = Targets(0.9 * ONE_S, 1.0)
    assert most_good(Machines(L40S, 8), [Request(L40S.token_budget, 1), Request(64, 1)], targets) == 1


def test_cached_prefixes_are_no_work() -> None:
    ids = tuple(range(L40S.token_budget // 512))
    prompts = [Request(L40S.token_budget + 1, 1, (*ids, 100 + number)) for number in range(10)]
    assert most_good(Machines(L40S, 1), prompts, Targets(2 * ONE_S, 1.0)) == pytest.approx(10)


def test_answers_take_what_the_tpot_target_leaves() -> None:
    """Half of a step that just meets the target is the base: the rest is the sequences'."""
    fit = L40S.fit
    targets = Targets(1.0, 2 * fit.base_s)
    each_s = fit.sequence_s + (1 + 501 / 2) * fit.context_token_s
    num_at_once = fit.base_s / each_s
    requests = [Request(1, 501)] * int(3 * num_at_once)
    found = most_good(Machines(L40S, 1), requests, targets)
    # Only the part of the first second that is not spent on prompts is there besides.
    assert num_at_once * 0.9 < found < num_at_once * 1.2


def test_slow_nodes_that_miss_the_tpot_target_idle_only_prefill() -> None:
    fit = L40S.fit
    requests = [Request(1, 501)] * 400
    all_fast, half_slow = (
        most_good(Machines(L40S, 2, slow_half), requests, Targets(1.0, 2 * fit.base_s))
        for slow_half in (False, True)
    )
    assert half_slow < 0.7 * all_fast


@pytest.mark.parametrize(
    "name", ["shifting", *(pytest.param(name, marks=pytest.mark.full) for name in ("agents", "code"))]
)
def test_no_policy_is_beyond_it(name: str) -> None:
    requests = at_rate(MADE_UP[name](80, 1), 40.0, 1)
    targets = default_targets(KINDS["a10g"], requests)
    machines = Machines(KINDS["a10g"], 4)
    bound = most_good(machines, requests, targets)
    runs = [simulate(machines, num, "flowkv", requests, targets).num_good for num in (1, 2, 3)]
    assert 0 < max(runs) <= bound + 1e-6
