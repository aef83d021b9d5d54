"""`python -m benchmarks.disturbed --json FILE --plot FILE`: the setups in turn, prints a table."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from benchmarks.command import Command
from benchmarks.disturbed.load import Load, run
from benchmarks.disturbed.report import Run, plot, table, write
from benchmarks.serving.loop import RequestFailed
from benchmarks.serving.servers import flowkv
from flowkv.local_cluster import ClusterError

_WARM_UP = Load(2, 32, 8, 600, 2, num_long=1, period_s=1.0)


def main(argv: list[str]) -> int:
    options = _options(argv)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("2 cores are needed", file=sys.stderr)
        return 2
    conditions: dict[str, object] = {
        "model": Path(options.model).name,
        "cores": cores,
        "pinned": "1P1D: each node on one core, 1 thread; one node: both cores, 2 threads; all else anywhere",
        "lending": False,
    }
    runs: list[Run] = []
    try:
        for chunk in [0, *options.chunks]:
            runs += _setup(chunk, cores, options)
            write(options.json, runs, conditions)  # after each: the last may be minutes away
    except (ClusterError, RequestFailed) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(runs))
    if options.plot:
        plot(options.plot, runs)
    print(f"wrote {options.json}")
    return 0


def _setup(chunk: int, cores: list[int], options: argparse.Namespace) -> list[Run]:
    name = f"chunk {chunk}" if chunk else "1P1D"
    print(f"[disturbed] {name}", file=sys.stderr, flush=True)
    settings = {"FLOWKV_LENDING": "false"}
    if chunk:  # a mixed node's chunk is half of its budget
        nodes, num_threads = {"mixed": set(cores)}, 2
        settings["FLOWKV_TOKEN_BUDGET"] = str(2 * chunk)
    else:
        nodes, num_threads = {"prefill": {cores[0]}, "decode": {cores[1]}}, 1
    run_dir = options.json.parent / "disturbed"
    with flowkv(run_dir, options.model, num_threads=num_threads, nodes=nodes, settings=settings) as server:
        asyncio.run(run(server.url, _WARM_UP, seed=-1))
        found = []
        for num_chats in options.chats:
            load = Load(num_chats, 64, 64, options.long, 4, options.num_long, options.period)
            for number in range(options.repeat):
                found.append(Run(name, chunk, load, number, asyncio.run(run(server.url, load, seed=number))))
    return found


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("disturbed", __doc__)
    parser = command.parser
    parser.add_argument("--plot", type=Path, help="and the plot; needs matplotlib")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--chats", type=int, nargs="+", default=[4], help="clients that chat")
    parser.add_argument("--long", type=int, default=2000, help="tokens of a long prompt")
    parser.add_argument("--num-long", type=int, default=4)
    parser.add_argument("--period", type=float, default=12.0, help="seconds between long prompts")
    parser.add_argument("--repeat", type=int, default=1)
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
