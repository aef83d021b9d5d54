"""`python -m benchmarks.simulate`: policies side by side on one trace, in simulated clusters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from benchmarks.result import write_result
from benchmarks.simulate.plot import plot
from benchmarks.simulate.presets import PRESETS
from benchmarks.simulate.report import figures, table
from benchmarks.simulate.run import POLICIES
from benchmarks.simulate.scene import BEST_STATIC, Scene, make_scene, outcome_of
from benchmarks.traces import TraceError


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument(
        "--trace", default="synthetic", help="Mooncake .jsonl, Azure .csv, `shifting` or `synthetic`"
    )
    parser.add_argument("--requests", type=int, default=2000, help="a window of the trace")
    parser.add_argument("--nodes", choices=PRESETS, default="h100", help="kind of all nodes")
    parser.add_argument("--fit", type=Path, help="JSON with the StepFit to use instead of the kind's")
    parser.add_argument("--fit-noise", type=float, default=0.0, help="relative error of the fits reported")
    parser.add_argument("--split", default="8:8", help="prefill and decode nodes to start with")
    parser.add_argument("--slow-half", action="store_true", help="every second node is 3 x slower")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rate", type=float, help="requests per second; the trace's own without")
    rates.add_argument("--load", type=float, help="share of what the best static split carries, found first")
    parser.add_argument("--ttft", type=float, help="target, seconds")
    parser.add_argument("--tpot", "--itl", type=float, help="target, seconds")
    parser.add_argument(
        "--policy", action="append", choices=(*POLICIES, BEST_STATIC), help="several; all without"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="a picture of the runs over time; needs matplotlib")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    try:
        scene = make_scene(options)
    except (OSError, TraceError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(conditions(options, scene))
    outcomes = []
    for policy in options.policy or (*POLICIES, BEST_STATIC):
        print(f"simulating {policy}", file=sys.stderr)
        outcomes.append(outcome_of(policy, scene))
    found = [figures(outcome) for outcome in outcomes]
    print(table(found))
    if options.json:
        report = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "rate": scene.rate,
            "targets": scene.targets._asdict(),
            "runs": msgspec.to_builtins(found),
        }
        write_result(options.json, "simulate", report)
    if options.plot:
        print(plot(outcomes, conditions(options, scene), options.plot))
    return 0


def conditions(options: argparse.Namespace, scene: Scene) -> str:
    return (
        f"{options.trace}: {len(scene.requests)} requests at {scene.rate:.3f}/s, seed {scene.seed}\n"
        f"{scene.machines.num_nodes} x {scene.machines.kind.name}"
        f"{', every second one 3 x slower' if options.slow_half else ''}, {options.split} to start with\n"
        f"targets: TTFT {scene.targets.ttft_s:.3f} s, TPOT {scene.targets.tpot_s * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
