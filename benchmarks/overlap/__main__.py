"""`python -m benchmarks.overlap --json FILE`: starts clusters in turn, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.command import Command, Report
from benchmarks.overlap.measure import RequestFailed, measure
from benchmarks.overlap.report import rows_of, table
from benchmarks.overlap.setups import CHUNK_TOKENS, SETUPS, NotPinned, Setup, cluster_of
from flowkv.local_cluster import ClusterError
from flowkv_common.errors import FlowKVError

_LENGTHS = (500, 1000, 2000, 4000)


def main(argv: list[str]) -> int:
    options = _options(argv)
    setups = [setup for setup in SETUPS if setup.name in options.setups]
    num_cores = max(setup.num_cores for setup in setups)
    if len(os.sched_getaffinity(0)) < num_cores:
        print(f"{num_cores} cores are needed, one for each node", file=sys.stderr)
        return 2
    report = Report(
        "overlap",
        {
            "connector": options.connector,
            "num_repeats": options.repeat,
            "chunk_tokens": CHUNK_TOKENS,
            "model": Path(options.model).name,
            "pinned": "all threads of a node on its own cores; NATS, scheduler, gateway and client anywhere",
            "time": "at the client, from sending the request; one request at a time, random prompts",
            "setups": {setup.name: asdict(setup) for setup in SETUPS},
        },
    )
    try:
        for setup in setups:
            _run(setup, options, report)
            report.write(options.json)  # after each: the last may be minutes away
    except (ClusterError, NotPinned, RequestFailed, FlowKVError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


def _run(setup: Setup, options: argparse.Namespace, report: Report) -> None:
    report.say(f"{setup.title}: starting")
    report.note_load(f"before {setup.name}")
    with (
        tempfile.TemporaryDirectory(prefix="flowkv-overlap-") as run_dir,
        cluster_of(setup, Path(run_dir), options.model, options.connector) as cluster,
    ):
        samples = asyncio.run(measure(cluster, setup, options.tokens, options.repeat, report.say))
    report.note_load(f"after {setup.name}")
    report.rows += rows_of(setup, samples)


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("overlap", __doc__)
    parser = command.parser
    parser.add_argument("--tokens", type=int, nargs="+", default=list(_LENGTHS), help="prompt lengths")
    parser.add_argument("--repeat", type=int, default=7, help="requests per row")
    parser.add_argument("--connector", default="shm", choices=("shm", "tcp"))
    parser.add_argument(
        "--setups", nargs="+", choices=[s.name for s in SETUPS], default=[s.name for s in SETUPS]
    )
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
