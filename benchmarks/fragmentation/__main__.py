"""`python -m benchmarks.fragmentation --json FILE`: replays a trace at three levels, cache off and on."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from benchmarks.fragmentation.plot import plot
from benchmarks.fragmentation.replay import Conditions, Replay
from benchmarks.fragmentation.report import figures, table
from benchmarks.host import commit
from benchmarks.result import write_result
from benchmarks.traces import Request, TraceError, read_trace, synthetic
from flowkv_engine.kv.blocks import OutOfBlocks

LEVELS = (0.6, 0.75, 0.9)
CACHES = {"off": (False,), "on": (True,), "both": (False, True)}
NUM_SYNTHETIC = 20_000


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fragmentation", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go; the plot lies beside")
    parser.add_argument("--trace", type=Path, help="Mooncake .jsonl or Azure .csv; a synthetic one without")
    parser.add_argument("--requests", type=int, default=100_000, help="the trace is repeated up to as many")
    parser.add_argument("--blocks", type=int, default=100_000, help="in each pool")
    parser.add_argument("--block-size", type=int, default=16, choices=(8, 16, 32, 64), help="tokens")
    parser.add_argument("--room", type=int, default=8, help="blocks left free behind a growing sequence")
    parser.add_argument("--cache", choices=CACHES, default="both", help="prefix cache")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    try:
        requests = read_trace(options.trace) if options.trace else synthetic(NUM_SYNTHETIC)
    except (OSError, TraceError) as error:
        print(error, file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "trace": options.trace.name if options.trace else "synthetic",
        "commit": commit(),
        "replays": [],
    }
    caches = CACHES[options.cache] if any(request.hash_ids for request in requests) else (False,)
    for has_cache, level in itertools.product(caches, LEVELS):
        print(
            f"[{report['trace']}] {level:.0%} leased, cache {'on' if has_cache else 'off'}", file=sys.stderr
        )
        conditions = Conditions(options.blocks, options.block_size, level, has_cache, options.room)
        try:
            report["replays"].append(figures(replayed(conditions, requests, options.requests)))
        except OutOfBlocks:
            print(f"running sequences outgrow a pool of {options.blocks} blocks", file=sys.stderr)
            return 1
        # After each, since the last may be an hour away.
        write_result(options.json, "fragmentation", report)
    print(table(report["replays"]))
    print(plot(report, options.json.with_suffix(".png")))
    return 0


def replayed(conditions: Conditions, requests: list[Request], num_requests: int) -> Replay:
    replay = Replay(conditions)
    replay.run(itertools.islice(itertools.cycle(requests), num_requests), num_requests)
    return replay


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
