"""Capacity, the best split, sizes of clusters, and the commands around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import BenchmarkFailed
from benchmarks import simulate_cells as cells
from benchmarks.baselines import ONE_NODE
from benchmarks.plan import Demand, advice, smallest, splits_to_try
from benchmarks.plan import main as plan
from benchmarks.simulate import COLUMNS, main
from benchmarks.simulator.batch import Histogram, Life
from benchmarks.simulator.kinds import KINDS
from benchmarks.simulator.run import (
    ALL_POLICIES,
    CHUNKS,
    GOOD_SHARE,
    PRECISION,
    Machines,
    Outcome,
    best_mixed,
    best_static,
    capacity,
    carrying_split,
    figures,
    simulate,
    splits_around,
)
from flowkv.bench.traces import Request, Targets, at_rate
from flowkv_common.errors import CannotStart

L40S = KINDS["l40s"]
TARGETS = Targets(2.0, 0.06)


def even_traffic(num_requests: int) -> list[Request]:
    return [Request(2_000, 20, (), float(n)) for n in range(num_requests)]


def test_splits_begin_at_the_likely_one_and_leave_a_node_for_each_side() -> None:
    assert splits_around(6, 4) == [4, 3, 5, 2, 1]


def test_capacity_is_where_targets_begin_to_be_missed() -> None:
    machines, requests = Machines(L40S, 2), even_traffic(60)
    found = capacity(machines, requests, TARGETS)
    assert found.num_prefill == 1
    slower, faster = (at_rate(requests, found.rate * share, 0) for share in (1, 1.05))
    carries = [carrying_split(machines, [1], timed, TARGETS, 0) for timed in (slower, faster)]
    assert carries == [1, None]
    assert PRECISION < 0.05


def test_capacity_is_nothing_when_nothing_helps() -> None:
    assert capacity(Machines(L40S, 2), even_traffic(5), Targets(1e-6, 1e-6)).rate == 0


def test_the_best_static_split_is_the_best_of_all_and_run_to_its_end() -> None:
    machines = Machines(L40S, 5)
    requests = at_rate(even_traffic(60), 12.0, seed=0)
    best = best_static(machines, requests, TARGETS, likely=1)
    all_good = [simulate(machines, n, "static", requests, TARGETS).num_good for n in range(1, 5)]
    assert best.num_good == max(all_good) > min(all_good)
    assert not best.has_failed
    assert all(life.is_done or life.refused_with for life in best.lives)


def test_the_smallest_cluster_carries_it_and_one_node_less_does_not() -> None:
    demand = Demand(even_traffic(60), 12.0, TARGETS, 0, "static")
    size = smallest(L40S, L40S, demand, max_nodes=16)
    assert size is not None
    num_nodes = size.num_prefill + size.num_decode
    timed = at_rate(demand.requests, 12.0, 0)
    max_bad = int((1 - GOOD_SHARE) * 60)
    assert not simulate(
        Machines(L40S, num_nodes), size.num_prefill, "static", timed, TARGETS, 0, max_bad
    ).has_failed
    assert num_nodes > 2
    assert carrying_split(Machines(L40S, num_nodes - 1), range(1, num_nodes - 1), timed, TARGETS, 0) is None
    assert 0 <= size.margin < 1


def test_splits_are_few_and_near_what_is_known() -> None:
    assert splits_to_try(2, None) == [1]
    assert sorted(splits_to_try(16, None)) == [2, 4, 6, 8, 10, 12, 14]
    assert splits_to_try(12, 0.75) == [9, 8, 10, 7, 11]
    assert splits_to_try(3, 0.9) == [2]


def test_no_cluster_is_large_enough_for_the_impossible() -> None:
    demand = Demand(even_traffic(5), 1.0, Targets(1e-6, 1e-6), 0, "static")
    assert smallest(L40S, L40S, demand, max_nodes=3) is None


def test_simulate_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    argv = ["--requests", "30", "--rate", "5", "--split", "1:2", "--nodes", "l40s", "--seed", "3"]
    argv += ["--policy", "flowkv", "--policy", "random"]
    assert main([*argv, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [run["policy"] for run in report["rows"]] == ["flowkv", "random"]
    assert {run["num_requests"] for run in report["rows"]} == {30}
    assert report["commit"]
    assert report["host"]["num_cores"]
    shown = capsys.readouterr().out
    assert all(column in shown for column in COLUMNS)
    assert "targets: TTFT" in shown


def test_simulate_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CannotStart, match="none.csv"):
        main(["--trace", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit):
        main(["--split", "8"])
    assert "--split" in capsys.readouterr().err


def test_a_plan_names_kinds_split_and_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    argv = ["--requests", "40", "--rate", "4", "--max-nodes", "8"]
    argv += ["--nodes", "h100", "--nodes", "l40s", "--price", "h100=4"]
    assert plan([*argv, "--ttft", "3", "--tpot", "0.08", "--json", str(file)]) == 0
    sizes = json.loads(file.read_text())["rows"]
    assert len(sizes) == 4
    assert [size["price"] for size in sizes] == sorted(size["price"] for size in sizes)
    assert sizes[0]["price"] == sizes[0]["num_prefill"] + sizes[0]["num_decode"]
    answer, reason = capsys.readouterr().out.splitlines()[-2:]
    assert answer.startswith(f"take {sizes[0]['num_prefill']} x l40s for prefill")
    assert "split them" in reason
    ways = json.loads(file.read_text())["ways"]
    assert list(ways) == ["split", "lending", "mixed"]
    with pytest.raises(BenchmarkFailed, match="no cluster of up to 2 nodes"):
        plan(["--requests", "5", "--ttft", "1e-6", "--max-nodes", "2", "--json", str(file)])


def test_mixed_nodes_have_the_best_chunk_budget() -> None:
    machines = Machines(L40S, 3)
    requests = at_rate(even_traffic(60), 9.0, seed=0)
    best = best_mixed(machines, 1, requests, TARGETS)
    chunk = best.machines.mixed_chunk
    assert chunk in CHUNKS
    assert {node.role for node in best.nodes} == {"mixed"}
    assert {node.batch.cap for node in best.nodes} == {chunk}
    others = [
        simulate(machines._replace(mixed_chunk=chunk), 0, policy, requests, TARGETS).num_good
        for chunk in CHUNKS
        for policy in ("static", ONE_NODE)
    ]
    assert best.num_good == max(others) > min(others)
    assert figures(best)["split"] == f"chunks of {chunk}"


def test_on_one_node_requests_stay() -> None:
    mixed = Machines(L40S, 3, mixed_chunk=512)
    lives = simulate(mixed, 0, ONE_NODE, at_rate(even_traffic(60), 9.0, seed=0), TARGETS).lives
    assert all(life.prefill == life.decode for life in lives)
    assert {life.prefill for life in lives} == {0, 1, 2}


def cells_of(
    mix: str, policies: Sequence[str], known: Sequence[cells.Cell] = (), seed: int = 1
) -> list[cells.Cell]:
    options = cells.parse_options(["--num-nodes", "4", "--requests", "12", "--policy", *policies])
    return cells.run_task(cells.Task("shifting", mix, seed, options, known))


def test_advice_names_the_best_way_and_what_the_others_miss() -> None:
    machines, targets = Machines(L40S, 4), Targets(2.0, 0.06)

    def way(mixed_chunk: int, ttfts_s: Sequence[float], num_refused: int) -> Outcome:
        lives = [Life(0, Request(10, 1), first_token_s=at, last_token_s=at) for at in ttfts_s]
        lives += [Life(0, Request(10, 1), refused_with=429)] * num_refused
        num_good = sum(at <= targets.ttft_s for at in ttfts_s)
        nodes = machines.nodes(2, Histogram())
        at = machines._replace(mixed_chunk=mixed_chunk)
        return Outcome("", at, 2, lives, Histogram(), nodes, 1.0, num_good, False, 0, 0.0)

    good, late, refused = way(0, [1.0] * 4, 0), way(256, [1.0, 1.0, 3.0, 1.0], 0), way(0, [1.0] * 3, 1)
    assert advice({"split": good, "lending": refused, "mixed": late}, targets) == (
        "split them, lending off: 100.0% of the requests are good with 2P:2D split; "
        "all mixed in chunks of 256 75.0% (0.0% refused, 25.0% miss TTFT, 0.0% miss TPOT); "
        "2P:2D with lending 75.0% (25.0% refused, 0.0% miss TTFT, 0.0% miss TPOT)"
    )
    assert advice({"split": late, "lending": late, "mixed": late}, targets).startswith(
        "do not split them: 75.0%"
    )
    assert advice({"split": late, "lending": good, "mixed": late}, targets).startswith(
        "split them and lend: 100.0%"
    )


@pytest.mark.parametrize(("mix", "policies"), [("alike", ALL_POLICIES), ("slow-half", ("flowkv", "static"))])
def test_cells_cover_loads_and_policies(mix: str, policies: Sequence[str]) -> None:
    found = cells_of(mix, policies)
    assert [(cell["load"], cell["mix"]) for cell in found] == [(load, mix) for load in cells.LOADS]
    assert {cell["nodes"] for cell in found} == {"a10g"}
    assert all(list(cell["runs"]) == list(policies) for cell in found)
    assert found[2]["rate"] == pytest.approx(1.3 / 0.7 * found[0]["rate"])
    lines = cells.means_of(found)
    assert len(lines) == len(found)
    assert all(set(policies) <= line.keys() for line in lines)


def test_beside_an_earlier_run_only_what_is_named_runs_again() -> None:
    earlier = cells_of("alike", ["flowkv", "best_static"])
    for cell in earlier:
        cell["carried"] *= 2  # as it was found then
        cell["runs"]["flowkv"]["good_share"] = -1.0
        cell["runs"]["best_static"]["good_share"] = -2.0
    again = cells_of("alike", ["flowkv"], known=earlier)
    assert [cell["rate"] for cell in again] == [2 * cell["rate"] for cell in earlier]
    assert all(cell["runs"]["flowkv"]["good_share"] >= 0 for cell in again)
    assert {cell["runs"]["best_static"]["good_share"] for cell in again} == {-2.0}
    others = cells_of("slow-half", ["flowkv"], known=earlier)  # not those of `earlier`
    assert {tuple(cell["runs"]) for cell in others} == {("flowkv",)}


def test_another_seed_has_the_loads_of_the_first_and_runs_of_its_own() -> None:
    first = cells_of("alike", ["static"])
    for cell in first:
        cell["carried"] *= 2  # as it was found
        cell["runs"]["static"]["good_share"] = -1.0
    other = cells_of("alike", ["static"], known=first, seed=2)
    assert [cell["rate"] for cell in other] == [2 * cell["rate"] for cell in first]
    assert {cell["seed"] for cell in other} == {2}
    assert all(cell["runs"]["static"]["good_share"] >= 0 for cell in other)


def test_differences_are_told_with_the_worst_row() -> None:
    rows = [
        {"trace": "code", "mix": "alike", "load": 0.7, "flowkv": 90.0, "static": 91.0, "best_static": 95.0},
        {"trace": "code", "mix": "alike", "load": 1.3, "flowkv": 80.0, "static": 75.0, "best_static": 87.0},
    ]
    assert cells.differences(rows) == [
        "flowkv - static: +2.0 on average, -1.0 at worst (code, alike, 70%)",
        "flowkv - best_static: -6.0 on average, -7.0 at worst (code, alike, 130%)",
    ]


def test_cells_want_their_traces(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="none.csv"):
        cells.main(["--json", str(tmp_path / "c.json"), "--trace", "none.csv"])


def test_the_command_prints_cells_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--trace", "shifting", "--seeds", "1", "--mixes", "alike", "--loads", "1", "--num-nodes", "4"]
    argv += ["--requests", "12", "--jobs", "1"]
    base, again = tmp_path / "base.json", tmp_path / "again.json"
    assert cells.main([*argv, "--policy", "flowkv", "best_static", "--json", str(base)]) == 0
    assert cells.main([*argv, "--policy", "flowkv", "--beside", str(base), "--json", str(again)]) == 0
    one, other = (json.loads(file.read_text())["rows"] for file in (base, again))
    assert one[0]["runs"].keys() == other[0]["runs"].keys() == {"flowkv", "best_static"}
    shown = capsys.readouterr().out
    assert shown.count("flowkv - best_static: ") == 2
