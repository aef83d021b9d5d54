"""Policies side by side on one trace, in simulated clusters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Report, fail, make_parser, options_of, table
from benchmarks.simulator.kinds import KINDS, Targets, default_targets, with_fit
from benchmarks.simulator.run import ALL_POLICIES, Figures, Machines, Scene, carried_by, figures
from benchmarks.traces import TRACE_HELP, TraceError, at_rate, cut_to, own_rate, read_window

COLUMNS = (
    "policy", "split", "good", "goodput/s", "TTFT p50 / p90 / p99 s", "TPOT p50 / p90 / p99 ms",
    "ITL p50 / p90 / p99 ms", "busy P / D", "cached", "lent", "waits", "refused", "requests/s",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    try:
        scene = make_scene(options)
    except (OSError, TraceError, ValueError) as error:
        return fail(error, 2)
    print(conditions(options, scene))
    report = Report(options.json, "simulate", options_of(options))
    report.more = {"rate": scene.rate, "targets": scene.targets._asdict()}
    for policy in options.policy or ALL_POLICIES:
        report.say(policy)
        report.rows.append(figures(scene.outcome(policy)))
    return report.finish(table(COLUMNS, map(line_of, report.rows)))


def make_scene(options: argparse.Namespace) -> Scene:
    """Raises OSError, TraceError or ValueError for what the options name wrongly."""
    kind = KINDS[options.nodes]
    if options.fit:
        kind = with_fit(kind, options.fit)
    num_prefill, num_decode = map(int, options.split.split(":"))
    machines = Machines(kind, num_prefill + num_decode, options.slow_half, options.fit_noise)
    chosen = cut_to(read_window(options.trace, options.requests, options.seed), kind.max_model_len)
    targets = default_targets(kind, chosen)
    targets = Targets(options.ttft or targets.ttft_s, options.tpot or targets.tpot_s)
    rate, likely = options.rate or own_rate(chosen), num_prefill
    if options.load:
        carried = carried_by(machines, chosen, targets, options.seed)
        rate, likely = options.load * carried.rate, carried.num_prefill
    timed = at_rate(chosen, rate, options.seed)
    return Scene(machines, num_prefill, timed, targets, rate, options.seed, likely)


def conditions(options: argparse.Namespace, scene: Scene) -> str:
    return (
        f"{options.trace}: {len(scene.requests)} requests at {scene.rate:.3f}/s, seed {scene.seed}\n"
        f"{scene.machines.num_nodes} x {scene.machines.kind.name}"
        f"{', every second one 3 x slower' if options.slow_half else ''}, {options.split} to start with\n"
        f"targets: TTFT {scene.targets.ttft_s:.3f} s, TPOT {scene.targets.tpot_s * 1e3:.1f} ms"
    )


def line_of(found: Figures) -> list[str]:
    return [
        found.policy,
        found.split,
        f"{found.good_share:.1%}",
        f"{found.goodput:.2f}",
        found.ttft_s.text(1, 2),
        found.tpot_s.text(1e3, 1),
        found.itl_s.text(1e3, 1),
        f"{found.prefill_utilisation:.0%} / {found.decode_utilisation:.0%}",
        f"{found.cached_share:.0%}",
        str(found.num_lendings),
        str(found.num_waits),
        str(sum(found.refusals.values())),
        f"{found.num_requests / found.wall_s:.0f}",
    ]


def add_traffic(parser: argparse.ArgumentParser, num_requests: int) -> None:
    """Which requests are sent, for all benchmarks that send those of a trace."""
    parser.add_argument("--trace", default="synthetic", help=TRACE_HELP)
    parser.add_argument("--requests", type=int, default=num_requests, help="a window of the trace")
    parser.add_argument("--seed", type=int, default=0)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("simulate", __doc__)
    add_traffic(parser, num_requests=2000)
    parser.add_argument("--nodes", choices=KINDS, default="h100", help="kind of all nodes")
    parser.add_argument("--fit", type=Path, help="JSON with the StepFit to use instead of the kind's")
    parser.add_argument("--fit-noise", type=float, default=0.0, help="relative error of the fits reported")
    parser.add_argument("--split", default="8:8", help="prefill and decode nodes to start with")
    parser.add_argument("--slow-half", action="store_true", help="every second node is 3 x slower")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rate", type=float, help="requests per second; the trace's own without")
    rates.add_argument("--load", type=float, help="share of what the best static split carries, found first")
    parser.add_argument("--ttft", type=float, help="target, seconds")
    parser.add_argument("--tpot", "--itl", type=float, help="target, seconds")
    parser.add_argument("--policy", action="append", choices=ALL_POLICIES, help="several; all without")
    return parser.parse_args(argv)
