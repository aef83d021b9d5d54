"""`python -m benchmarks.transfer --json FILE`: measures, prints a table, writes JSON and pictures."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from benchmarks.transfer.measure import Case, Effort, measure_case
from benchmarks.transfer.report import HEADER, Report
from benchmarks.transfer.shapes import SHAPES
from benchmarks.transfer.strategies import STRATEGIES, USED_SHARE
from benchmarks.transfer.transports import TRANSPORTS

_TOKENS = (500, 1000, 4000, 8000, 13000)
_QUICK_TOKENS = (500,)
_QUICK_SHAPES = ("llama",)
_EFFORT = Effort(num_repeats=9, budget_s=20.0)
_QUICK_EFFORT = Effort(num_repeats=3, budget_s=1.0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go, pictures beside it")
    parser.add_argument("--tokens", type=int, nargs="+", help="prompt lengths")
    parser.add_argument("--shape", choices=SHAPES, nargs="+")
    parser.add_argument("--connectors", choices=TRANSPORTS, nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--strategies", choices=STRATEGIES, nargs="+", default=list(STRATEGIES))
    parser.add_argument("--repeat", type=int, help="timed runs per row, fewer where they take long")
    parser.add_argument("--quick", action="store_true", help="one shape and length, few runs: under a minute")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    effort = _QUICK_EFFORT if arguments.quick else _EFFORT
    effort = Effort(arguments.repeat or effort.num_repeats, effort.budget_s)
    report = Report(
        {
            "num_repeats": effort.num_repeats,
            "budget_s_per_row": effort.budget_s,
            "used_share_of_pool": USED_SHARE,
            "cache": "evicted before each transfer, placements rotated",
            "checked": "CRC-32 on both sides, outside of the timed part",
            "memcpy": "C library, one thread, one call, between the transfers",
        }
    )
    print(HEADER, flush=True)
    tokens = arguments.tokens or (_QUICK_TOKENS if arguments.quick else _TOKENS)
    shapes = arguments.shape or (_QUICK_SHAPES if arguments.quick else tuple(SHAPES))
    for shape, num_tokens in itertools.product(shapes, tokens):
        case = Case(shape, num_tokens)
        rows = measure_case(case, arguments.connectors, arguments.strategies, effort, report.remark)
        report.add(rows)
    report.write(arguments.json)
    print(f"wrote {arguments.json}")
    _write_plots(report, arguments.json)


def _write_plots(report: Report, path: Path) -> None:
    try:
        from benchmarks.transfer.plot import plot
    except ImportError:
        print("no pictures: matplotlib is not installed, `make bench-peers-install` brings it")
        return
    for written in plot(report.rows, path):
        print(f"wrote {written}")


if __name__ == "__main__":
    main()
