"""`python -m benchmarks NAME [options]` runs a benchmark; without a name, lists them."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "The simulator: no model, no GPU, no cluster": {
        "simulate": "policies side by side on one trace",
        "simulate-cells": "all policies on all traces, loads and mixes of nodes",
        "plan": "the smallest cluster that keeps the targets on a trace",
    },
    "A scheduler's record": {
        "record": "write down what a running scheduler hears and decides",
        "replay": "decide a recording's requests again, by another policy",
    },
}


def main(argv: list[str]) -> int:
    names = {name for group in BENCHMARKS.values() for name in group}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for title, group in BENCHMARKS.items():
            print(f"\n{title}")
            for name, text in group.items():
                print(f"  {name:<16}{text}")
        return 0
    if argv[0] not in names:
        print(f"unknown benchmark {argv[0]!r}: choose one of {', '.join(sorted(names))}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{argv[0].replace('-', '_')}")
    status: int = module.main(argv[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
