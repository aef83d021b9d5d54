"""The smallest cluster that keeps the targets on a trace, and whether its nodes should be split at all.

With several kinds of nodes it also says which should prefill and which decode.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from benchmarks import BenchmarkFailed
from benchmarks.baselines import POLICIES
from benchmarks.report import Report, make_parser
from benchmarks.simulator.kinds import KINDS, NodeKind, targets_of
from benchmarks.simulator.run import (
    GOOD_SHARE,
    Machines,
    Outcome,
    best_mixed,
    best_static,
    carrying_split,
    figures,
    simulate,
    splits_around,
)
from benchmarks.traffic import add_traffic, read_window
from flowkv.bench.traces import Request, Targets, at_rate, cut_to, own_rate

# Relative precision of the margin, and the greatest that is looked for.
MARGIN_PRECISION = 0.02
MAX_MARGIN = 1.0
# While nothing carries the traffic, splits are tried in steps of an eighth; then within a sixth of the last.
COARSE_PARTS = 8
NEAR_SHARE = 6


class Demand(NamedTuple):
    """The traffic and what its users are to see."""

    requests: Sequence[Request]
    rate: float
    targets: Targets
    seed: int
    policy: str


class Size(NamedTuple):
    """`margin` is how much more traffic the same nodes, split the same way, would carry: 0.1 is 10 %."""

    prefill: NodeKind
    decode: NodeKind
    num_prefill: int
    num_decode: int
    margin: float

    @property
    def num_nodes(self) -> int:
        return self.num_prefill + self.num_decode


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    kinds = [KINDS[name] for name in options.nodes or ["h100"]]
    window = read_window(options.trace, options.requests, options.seed)
    requests = cut_to(window, min(kind.max_model_len for kind in kinds))
    targets = targets_of(kinds[0], requests, options)
    demand = Demand(requests, options.rate or own_rate(requests), targets, options.seed, options.policy)
    print(
        f"{options.trace}: {len(requests)} requests at {demand.rate:.3f}/s, {GOOD_SHARE:.0%} of them within "
        f"TTFT {targets.ttft_s:.3f} s and TPOT {targets.tpot_s * 1e3:.1f} ms"
    )
    report = Report(options)
    report.more = {"rate": demand.rate, "targets": targets._asdict()}
    prices = dict(options.price)
    for prefill, decode in product(kinds, kinds):
        if prefill.layout != decode.layout:
            continue  # they can't exchange blocks
        report.say(f"sizing {prefill.name} for prefill, {decode.name} for decode")
        if size := smallest(prefill, decode, demand, options.max_nodes):
            price = size.num_prefill * prices.get(prefill.name, 1.0)
            price += size.num_decode * prices.get(decode.name, 1.0)
            names = {"prefill": prefill.name, "decode": decode.name}
            report.rows.append({**size._asdict(), **names, "price": price})
    if not report.rows:
        raise BenchmarkFailed(f"no cluster of up to {options.max_nodes} nodes keeps the targets")
    report.rows.sort(key=lambda row: row["price"])
    report.finish("prefill", "decode", "num_prefill", "num_decode", "price", "margin")
    best = report.rows[0]
    print(
        f"take {best['num_prefill']} x {best['prefill']} for prefill and {best['num_decode']} x "
        f"{best['decode']} for decode: they carry {best['margin']:.0%} more than this"
    )
    report.say("the same nodes split, lent, and all mixed")
    size = Size(
        KINDS[best["prefill"]], KINDS[best["decode"]], best["num_prefill"], best["num_decode"], best["margin"]
    )
    ways = ways_to_serve(size, demand)
    report.more["ways"] = {name: figures(outcome) for name, outcome in ways.items()}
    report.write()
    print(advice(ways, targets))
    return 0


def smallest(prefill: NodeKind, decode: NodeKind, demand: Demand, max_nodes: int) -> Size | None:
    """The fewest nodes that keep the targets for `GOOD_SHARE` of requests; None when `max_nodes` don't.

    Assumes that more nodes carry no less, and that good splits have similar proportions.
    """
    timed = at_rate(demand.requests, demand.rate, demand.seed)
    too_few, best, num_nodes = 1, None, 2
    while too_few < max_nodes and (best is None or best.num_nodes - too_few > 1):
        splits = splits_to_try(num_nodes, best.num_prefill / best.num_nodes if best else None)
        machines = Machines(prefill, num_nodes, decode_kind=decode)
        found = carrying_split(machines, splits, timed, demand.targets, demand.seed, demand.policy)
        if found is None:
            too_few = num_nodes
        else:
            best = Size(prefill, decode, found, num_nodes - found, 0.0)
        num_nodes = (too_few + best.num_nodes) // 2 if best else min(2 * num_nodes, max_nodes)
    return best._replace(margin=margin(best, demand)) if best else None


def ways_to_serve(size: Size, demand: Demand) -> dict[str, Outcome]:
    """What the same nodes make of the demand: the best static split, lending from there, all mixed."""
    machines = Machines(size.prefill, size.num_nodes, decode_kind=size.decode)
    timed = at_rate(demand.requests, demand.rate, demand.seed)
    targets, seed, num_prefill = demand.targets, demand.seed, size.num_prefill
    if size.prefill == size.decode:
        split = best_static(machines, timed, targets, seed, num_prefill)
    else:
        split = simulate(machines, num_prefill, "static", timed, targets, seed)
    lending = simulate(machines, split.num_prefill, "flowkv", timed, targets, seed)
    return {
        "split": split,
        "lending": lending,
        "mixed": best_mixed(machines, num_prefill, timed, targets, seed),
    }


def advice(ways: Mapping[str, Outcome], targets: Targets) -> str:
    """Should the nodes be split, and what do the other ways miss? Of equals the simpler way."""
    split, mixed, lending = (ways[name] for name in ("split", "mixed", "lending"))
    names = {
        "split": f"{figures(split)['split']} split",
        "mixed": f"all mixed in {figures(mixed)['split']}",
        "lending": f"{figures(lending)['split']} with lending",
    }
    best = max(("mixed", "split", "lending"), key=lambda name: ways[name].num_good)
    head = {
        "split": "split them, lending off",
        "mixed": "do not split them",
        "lending": "split them and lend",
    }
    others = "; ".join(
        f"{names[name]} {ways[name].good_share:.1%} ({misses(ways[name], targets)})"
        for name in names
        if name != best
    )
    return f"{head[best]}: {ways[best].good_share:.1%} of the requests are good with {names[best]}; {others}"


def misses(outcome: Outcome, targets: Targets) -> str:
    """Of all requests, how many were refused, and how many missed a target."""
    done = [life for life in outcome.lives if life.is_done]
    shares = {
        "refused": sum(life.refused_with > 0 for life in outcome.lives),
        "miss TTFT": sum(life.ttft_s > targets.ttft_s for life in done),
        "miss TPOT": sum(life.tpot_s > targets.tpot_s for life in done),
    }
    return ", ".join(f"{num / len(outcome.lives):.1%} {what}" for what, num in shares.items())


def splits_to_try(num_nodes: int, share: float | None) -> list[int]:
    """Numbers of prefill nodes: near their share in a larger cluster, if known; else a few from all over."""
    if share is not None:
        width = max(1, num_nodes // NEAR_SHARE)
        near = splits_around(num_nodes, round(share * num_nodes))
        return [split for split in near if abs(split - share * num_nodes) <= width]
    coarse = {round(num_nodes * part / COARSE_PARTS) for part in range(1, COARSE_PARTS)}
    return [split for split in splits_around(num_nodes, num_nodes // 2) if split in coarse]


def margin(size: Size, demand: Demand) -> float:
    """How much more of the same traffic the split carries, up to `MAX_MARGIN`."""
    machines = Machines(size.prefill, size.num_nodes, decode_kind=size.decode)
    splits, targets, seed = [size.num_prefill], demand.targets, demand.seed
    low, high = 0.0, MAX_MARGIN
    while high - low > MARGIN_PRECISION:
        middle = (low + high) / 2
        timed = at_rate(demand.requests, demand.rate * (1 + middle), seed)
        found = carrying_split(machines, splits, timed, targets, seed, demand.policy)
        low, high = (low, middle) if found is None else (middle, high)
    return low


def price_of(text: str) -> tuple[str, float]:
    name, _, price = text.partition("=")
    return name, float(price)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("plan", __doc__)
    add_traffic(parser, num_requests=2000)
    parser.add_argument("--nodes", action="append", choices=KINDS, help="to choose from; h100 without")
    parser.add_argument(
        "--price", action="append", type=price_of, default=[], help="KIND=NUMBER of a node; or 1"
    )
    parser.add_argument("--rate", type=float, help="requests per second; the trace's own without")
    parser.add_argument("--ttft", type=float, help="target, seconds")
    parser.add_argument("--tpot", "--itl", type=float, help="target, seconds")
    parser.add_argument("--policy", choices=POLICIES, default="static", help="the scheduler's policy")
    parser.add_argument("--max-nodes", type=int, default=64)
    return parser.parse_args(argv)
