"""`python -m benchmarks.load --url URL --rate 5 --seconds 30`: loads a running cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.load.arrivals import Arrival, Lengths, Phase, from_trace, poisson
from benchmarks.load.drive import drive
from benchmarks.load.summary import Targets, summarize


def main(argv: list[str]) -> int:
    options = _options(argv)
    arrivals = _arrivals(options)
    if not arrivals:
        print("no request comes in that time", file=sys.stderr)
        return 2
    outcomes = asyncio.run(drive(options.url, arrivals, seed=options.seed))
    targets = Targets(options.ttft_s, options.tpot_s)
    print(json.dumps(asdict(summarize(outcomes, targets, max(arrivals[-1].at_s, 1.0))), indent=1))
    return 0


def _arrivals(options: argparse.Namespace) -> list[Arrival]:
    if options.trace:
        return from_trace(options.trace, options.rate_factor)
    lengths = Lengths(options.prompt_tokens, options.max_tokens, options.spread)
    phase = Phase("load", options.rate, options.seconds, lengths)
    return list(poisson([phase], random.Random(options.seed)))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second, on average")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--spread", type=float, default=0.5, help="share by which lengths differ")
    parser.add_argument("--trace", type=Path, help="a trace of Mooncake's (.jsonl) instead")
    parser.add_argument("--rate-factor", type=float, default=1.0, help="how much faster than the trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-s", type=float, default=5.0, help="target")
    parser.add_argument("--tpot-s", type=float, default=0.2, help="target")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
