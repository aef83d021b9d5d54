"""An open loop of load for any cluster that runs, and the figures of what became of it."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkFailed
from benchmarks.report import Quantiles, Report, make_parser, quantiles, transposed
from flowkv.bench.load import Lengths, Outcome, Phase, arrivals_of, drive, poisson
from flowkv.bench.traces import Targets, read_trace


def check_complete(outcomes: Iterable[Outcome]) -> None:
    """Raises BenchmarkFailed unless all requests got all of their tokens."""
    for outcome in outcomes:
        _, num_prompt_tokens, num_output_tokens, *_ = outcome.arrival
        if not outcome.is_complete or len(outcome.token_ids) != num_output_tokens:
            raise BenchmarkFailed(
                f"a prompt of {num_prompt_tokens}: {len(outcome.token_ids)} of {num_output_tokens} tokens, "
                f"{outcome.error or outcome.status}"
            )


# --- figures ----------------------------------------------------------------------------------------


def summarize(outcomes: Sequence[Outcome], targets: Targets, duration_s: float) -> dict[str, Any]:
    """Figures of requests that were sent over `duration_s`; times in seconds.

    Good requests were complete and within both targets; goodput counts them per second. ITL is over all gaps
    of all complete requests; a request keeps the target when its mean gap does.
    """
    complete = [outcome for outcome in outcomes if outcome.is_complete]
    num_good = sum(targets.are_met(outcome.ttft_s, outcome.tpot_s) for outcome in complete)
    return {
        "num_sent": len(outcomes),
        "num_complete": len(complete),
        "num_good": num_good,
        "goodput_per_s": round(num_good / duration_s, 3),
        "output_tokens_per_s": round(sum(len(each.token_ids) for each in complete) / duration_s, 2),
        "ttft_s": ttfts(complete),
        "itl_s": quantiles(gap for outcome in complete for gap in outcome.itls_s),
        "tpot_s": quantiles(outcome.tpot_s for outcome in complete),
        "e2e_s": quantiles(outcome.ended_s for outcome in complete),
        "statuses": dict(Counter(str(outcome.status) for outcome in outcomes)),
        "errors": errors_of(outcomes),
        "client_late_s": quantiles(outcome.late_s for outcome in outcomes),
    }


def ttfts(outcomes: Iterable[Outcome]) -> Quantiles:
    return quantiles(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None)


def errors_of(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How often each error came, refusals aside."""
    return dict(Counter(each.error for each in outcomes if each.error and each.status != 429))


# --- the command ------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = make_parser("load", __doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second, on average")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--spread", type=float, default=0.5, help="share by which lengths differ")
    parser.add_argument("--trace", type=Path, help="Mooncake .jsonl or Azure .csv instead")
    parser.add_argument("--rate-factor", type=float, default=1.0, help="how much faster than the trace")
    parser.add_argument("--seed", type=int, default=0)
    add_targets(parser)
    options = parser.parse_args(argv)
    if options.trace:
        arrivals = arrivals_of(read_trace(options.trace), options.rate_factor)
    else:
        lengths = Lengths(options.prompt_tokens, options.max_tokens, options.spread)
        phase = Phase("load", options.rate, options.seconds, lengths)
        arrivals = list(poisson([phase], random.Random(options.seed)))
    if not arrivals:
        raise BenchmarkFailed("no request comes in that time")
    report = Report(options)
    outcomes = asyncio.run(drive(options.url, arrivals, seed=options.seed))
    report.add_row(url=options.url, **summarize(outcomes, targets_of(options), max(arrivals[-1].at_s, 1.0)))
    return report.finish(shown=transposed(report.rows, "url"))


def add_targets(parser: argparse.ArgumentParser, ttft_s: float = 5.0, tpot_s: float = 0.2) -> None:
    parser.add_argument("--ttft-s", type=float, default=ttft_s, help="target, seconds")
    parser.add_argument("--tpot-s", type=float, default=tpot_s, help="target, seconds")


def targets_of(options: argparse.Namespace) -> Targets:
    return Targets(options.ttft_s, options.tpot_s)
