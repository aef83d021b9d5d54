"""`python -m benchmarks.overlap --json FILE`: starts clusters in turn, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.model import default_model
from benchmarks.overlap.measure import RequestFailed, measure
from benchmarks.overlap.report import Report, rows_of, table
from benchmarks.overlap.setups import CHUNK_TOKENS, SETUPS, NotPinned, Setup, cluster_of
from flowkv_common.errors import FlowKVError
from scripts.local_cluster import ClusterError

_LENGTHS = (500, 1000, 2000, 4000)


def main(argv: list[str]) -> int:
    options = _options(argv)
    setups = [setup for setup in SETUPS if setup.name in options.setups]
    num_cores = max(setup.num_cores for setup in setups)
    if len(os.sched_getaffinity(0)) < num_cores:
        print(f"{num_cores} cores are needed, one for each node", file=sys.stderr)
        return 2
    report = Report(
        {
            "connector": options.connector,
            "num_repeats": options.repeat,
            "chunk_tokens": CHUNK_TOKENS,
            "model": Path(options.model).name,
            "pinned": "all threads of a node on its own cores; NATS, scheduler, gateway and client anywhere",
            "time": "at the client, from sending the request; one request at a time, random prompts",
        }
    )
    try:
        for setup in setups:
            _run(setup, options, report)
            report.write(options.json)  # after each: the last may be minutes away
    except (ClusterError, NotPinned, RequestFailed, FlowKVError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(report.rows))
    print(f"wrote {options.json}")
    return 0


def _run(setup: Setup, options: argparse.Namespace, report: Report) -> None:
    _say(f"{setup.title}: starting")
    report.note_load(setup, "before")
    with (
        tempfile.TemporaryDirectory(prefix="flowkv-overlap-") as run_dir,
        cluster_of(setup, Path(run_dir), options.model, options.connector) as cluster,
    ):
        samples = asyncio.run(measure(cluster, setup, options.tokens, options.repeat, _say))
    report.note_load(setup, "after")
    report.rows += rows_of(setup, samples)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(_LENGTHS), help="prompt lengths")
    parser.add_argument("--repeat", type=int, default=7, help="requests per row")
    parser.add_argument("--connector", default="shm", choices=("shm", "tcp"))
    parser.add_argument(
        "--setups", nargs="+", choices=[s.name for s in SETUPS], default=[s.name for s in SETUPS]
    )
    parser.add_argument("--model", default="", help="a prepared folder; the default model if empty")
    options = parser.parse_args(argv)
    options.model = options.model or default_model()
    return options


def _say(text: str) -> None:
    print(f"[overlap] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
