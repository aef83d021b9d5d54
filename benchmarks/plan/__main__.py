"""`python -m benchmarks.plan --trace FILE`: the smallest cluster that keeps the targets on a trace.

With several kinds of nodes it also says which should prefill and which decode.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

from benchmarks.plan.sizing import Demand, Kinds, Size, smallest
from benchmarks.result import write_result
from benchmarks.simulate.capacity import GOOD_SHARE
from benchmarks.simulate.presets import PRESETS
from benchmarks.simulate.report import layout
from benchmarks.simulate.run import POLICIES
from benchmarks.simulate.scene import read_window
from benchmarks.simulate.targets import Targets, default_targets
from benchmarks.simulate.traffic import cut_to, own_rate
from benchmarks.traces import TraceError


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument(
        "--trace", default="synthetic", help="Mooncake .jsonl, Azure .csv, `shifting` or `synthetic`"
    )
    parser.add_argument("--requests", type=int, default=2000, help="a window of the trace")
    parser.add_argument("--nodes", action="append", choices=PRESETS, help="to choose from; h100 without")
    parser.add_argument("--price", action="append", default=[], help="KIND=NUMBER of one node; 1 without")
    parser.add_argument("--rate", type=float, help="requests per second; the trace's own without")
    parser.add_argument("--ttft", type=float, help="target, seconds")
    parser.add_argument("--tpot", "--itl", type=float, help="target, seconds")
    parser.add_argument("--policy", choices=POLICIES, default="static", help="who schedules")
    parser.add_argument("--max-nodes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    try:
        kinds = [PRESETS[name] for name in options.nodes or ["h100"]]
        prices = {name: float(price) for name, _, price in (one.partition("=") for one in options.price)}
        window = read_window(options.trace, options.requests, options.seed)
    except (OSError, TraceError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    requests = cut_to(window, min(kind.max_model_len for kind in kinds))
    targets = default_targets(kinds[0], requests)
    targets = Targets(options.ttft or targets.ttft_s, options.tpot or targets.tpot_s)
    demand = Demand(requests, options.rate or own_rate(requests), targets, options.seed, options.policy)
    print(
        f"{options.trace}: {len(requests)} requests at {demand.rate:.3f}/s, {GOOD_SHARE:.0%} of them within "
        f"TTFT {targets.ttft_s:.3f} s and TPOT {targets.tpot_s * 1e3:.1f} ms"
    )
    found = []
    for prefill, decode in product(kinds, kinds):
        if prefill.layout == decode.layout:  # else they can't exchange blocks
            print(f"sizing {prefill.name} for prefill, {decode.name} for decode", file=sys.stderr)
            size = smallest(Kinds(prefill, decode), demand, options.max_nodes)
            found += [size] if size else []
    found.sort(key=lambda size: size.price(prices))
    print(table(found, prices))
    print(answer(found, options.max_nodes))
    if options.json:
        report = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "rate": demand.rate,
            "targets": targets._asdict(),
            "sizes": [as_json(size, prices) for size in found],
        }
        write_result(options.json, "plan", report)
    return 0 if found else 1


def table(sizes: list[Size], prices: dict[str, float]) -> str:
    """The cheapest first."""
    lines = [["prefill", "decode", "nodes", "split", "price", "margin"]]
    for size in sizes:
        split = f"{size.num_prefill}P:{size.num_decode}D"
        names = [kind.name for kind in size.kinds]
        lines.append([*names, str(size.num_nodes), split, f"{size.price(prices):g}", f"{size.margin:.0%}"])
    return layout(lines)


def answer(sizes: list[Size], max_nodes: int) -> str:
    if not sizes:
        return f"no cluster of up to {max_nodes} nodes keeps the targets"
    best = sizes[0]
    return (
        f"take {best.num_prefill} x {best.kinds.prefill.name} for prefill and {best.num_decode} x "
        f"{best.kinds.decode.name} for decode: they carry {best.margin:.0%} more than this"
    )


def as_json(size: Size, prices: dict[str, float]) -> dict[str, object]:
    return {
        "prefill": size.kinds.prefill.name,
        "decode": size.kinds.decode.name,
        "num_prefill": size.num_prefill,
        "num_decode": size.num_decode,
        "price": size.price(prices),
        "margin": size.margin,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
