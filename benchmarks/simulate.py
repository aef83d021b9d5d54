"""Policies side by side on one trace, in simulated clusters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Report, make_parser
from benchmarks.simulator.kinds import KINDS, targets_of, with_fit
from benchmarks.simulator.run import ALL_POLICIES, Machines, carried_by, figures, run_policy
from benchmarks.traffic import add_traffic, read_window
from flowkv.bench.traces import at_rate, cut_to, own_rate

COLUMNS = (
    "policy", "split", "good_share", "goodput", "ttft_s", "tpot_s", "itl_s", "prefill_utilisation",
    "decode_utilisation", "cached_share", "num_lendings", "num_waits", "num_refused",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    kind = with_fit(KINDS[options.nodes], options.fit) if options.fit else KINDS[options.nodes]
    num_prefill, num_decode = options.split
    machines = Machines(kind, num_prefill + num_decode, options.slow_half)
    chosen = cut_to(read_window(options.trace, options.requests, options.seed), kind.max_model_len)
    targets = targets_of(kind, chosen, options)
    rate, likely = options.rate or own_rate(chosen), num_prefill
    if options.load:
        carried = carried_by(machines, chosen, targets, options.seed)
        rate, likely = options.load * carried.rate, carried.num_prefill
    timed = at_rate(chosen, rate, options.seed)
    print(
        f"{options.trace}: {len(timed)} requests at {rate:.3f}/s, seed {options.seed}\n"
        f"{machines.num_nodes} x {kind.name}{', every second one 3 x slower' if options.slow_half else ''}, "
        f"{num_prefill}:{num_decode} to start with\n"
        f"targets: TTFT {targets.ttft_s:.3f} s, TPOT {targets.tpot_s * 1e3:.1f} ms"
    )
    report = Report(options)
    report.more = {"rate": rate, "targets": targets._asdict()}
    for policy in options.policy or ALL_POLICIES:
        report.say(policy)
        report.add_row(
            **figures(run_policy(policy, machines, num_prefill, timed, targets, options.seed, likely))
        )
    return report.finish(*COLUMNS)


def split_of(text: str) -> tuple[int, int]:
    num_prefill, num_decode = map(int, text.split(":"))
    return num_prefill, num_decode


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("simulate", __doc__)
    add_traffic(parser, num_requests=2000)
    parser.add_argument("--nodes", choices=KINDS, default="h100", help="kind of all nodes")
    parser.add_argument("--fit", type=Path, help="JSON with the StepFit to use instead of the kind's")
    parser.add_argument(
        "--split", type=split_of, default="8:8", help="prefill and decode nodes to start with"
    )
    parser.add_argument("--slow-half", action="store_true", help="every second node is 3 x slower")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rate", type=float, help="requests per second; the trace's own without")
    rates.add_argument("--load", type=float, help="share of what the best static split carries, found first")
    parser.add_argument("--ttft", type=float, help="target, seconds")
    parser.add_argument("--tpot", "--itl", type=float, help="target, seconds")
    parser.add_argument("--policy", action="append", choices=ALL_POLICIES, help="several; all without")
    return parser.parse_args(argv)
