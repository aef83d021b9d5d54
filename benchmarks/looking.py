"""What looking costs: an open live page, traces to OpenTelemetry, a log line per request.

The same closed loop of clients asks clusters that differ in one of these alone, one after the other, in an
order that changes with each round. All of them run all the time; only one has load. With paced nodes, whose
steps take next to nothing, the services are what bounds the load. With real ones it is the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from benchmarks.clusters import UNBOUNDED, cpu_s, start_cluster
from benchmarks.load import check_complete, summarize
from benchmarks.report import Report, make_parser, spread
from flowkv.bench.load import Lengths, closed_loop, connection
from flowkv.bench.traces import Targets
from flowkv.local_cluster import Cluster
from flowkv_common.wire.nodes import StepFit

# Steps that take next to nothing: the services are the bound.
FAST = StepFit(base_s=1e-4, prefill_token_s=1e-6, attended_token_s=0, sequence_s=0, context_token_s=0)
TARGETS = Targets(ttft_s=5.0, tpot_s=0.2)
ONE_PAIR = {"prefill": 1, "decode": 1}
PLAIN, PAGE = "nothing", "live page"
# What a cluster is started with: whether requests are logged, and whether spans are sent.
CLUSTERS = {
    PLAIN: (False, False),
    "request lines": (True, False),
    "traces": (False, True),
    "all": (True, True),
}
# Who is asked with an open page: the cluster of this name.
WITH_PAGE = {PAGE: PLAIN, "all": "all"}


class Load(NamedTuple):
    num_clients: int
    lengths: Lengths
    num_requests: int


LOADS = {
    "paced": Load(16, Lengths(64, 32), 400),
    "real": Load(4, Lengths(64, 32), 16),
}


def main(argv: Sequence[str]) -> int:
    parser = make_parser("looking", __doc__, model=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nodes", choices=("paced", "real"), nargs="+", default=["paced", "real"])
    options = parser.parse_args(argv)
    report = Report(options, loads=LOADS)
    for nodes in options.nodes:
        fit = FAST if nodes == "paced" else None
        with contextlib.ExitStack() as opened:
            collector_url = opened.enter_context(swallowing_spans())
            clusters = {
                name: opened.enter_context(
                    started(options.model, fit, lines, collector_url if traces else "")
                )
                for name, (lines, traces) in CLUSTERS.items()
            }
            asyncio.run(measure(nodes, clusters, options.rounds, report))
    return report.finish(shown=medians(report.rows))


@contextlib.contextmanager
def started(model: str, fit: StepFit | None, lines: bool, collector_url: str) -> Iterator[Cluster]:
    """A cluster that logs `lines`, and sends its spans to `collector_url` if there is one."""
    settings = {"log_requests": lines, "lending": False, "live_page": "on", **UNBOUNDED}
    with contextlib.ExitStack() as opened:
        with environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector_url):
            cluster = opened.enter_context(start_cluster(model, ONE_PAIR, settings=settings, fit=fit)).cluster
        yield cluster


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """What is started inside has these variables, too."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def swallowing_spans() -> Iterator[str]:
    """A collector that takes all and keeps nothing, on a thread; its URL."""

    class Swallow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """One line per batch would be more than the benchmark says."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Swallow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def measure(nodes: str, clusters: Mapping[str, Cluster], num_rounds: int, report: Report) -> None:
    load, rng = LOADS[nodes], random.Random(nodes)
    names = [*clusters, PAGE]
    for number in range(-1, num_rounds):  # one to warm up
        for name in rng.sample(names, len(names)):
            cluster = clusters[WITH_PAGE.get(name, name)]
            async with contextlib.AsyncExitStack() as opened:
                if name in WITH_PAGE:
                    await opened.enter_async_context(open_page(cluster.url))
                figures = await ask(cluster, load, rng)
            if number >= 0:
                report.add_row(nodes=nodes, looking=name, round=number, **figures)
        report.say(f"{nodes} nodes: round {number + 1} of {num_rounds}")


async def ask(cluster: Cluster, load: Load, rng: random.Random) -> dict[str, Any]:
    """Raises BenchmarkFailed if a request has failed."""
    pids = {name: process.pid for name, process in cluster.processes.items() if name != "nats"}
    before, began = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
    turns = range(load.num_requests)
    outcomes = await closed_loop(cluster.url, rng, load.lengths, load.num_clients, turns)
    duration_s = time.monotonic() - began
    check_complete(outcomes)
    cpu_ms = {name: 1e3 * (cpu_s(pid) - before[name]) / load.num_requests for name, pid in pids.items()}
    figures = summarize(outcomes, TARGETS, duration_s)
    return {
        "output_tokens_per_s": figures["output_tokens_per_s"],
        "ttft_s": figures["ttft_s"],
        "gateway_cpu_ms": cpu_ms["gateway"],
        "cpu_ms": sum(cpu_ms.values()),  # of all services and nodes
    }


@contextlib.asynccontextmanager
async def open_page(url: str) -> AsyncIterator[None]:
    """What a browser's page hears, read and dropped."""
    async with connection(url) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        await reader.readuntil(b"data: ")

        async def read() -> None:
            while await reader.read(1 << 16):
                pass

        reading = asyncio.create_task(read())
        try:
            yield
        finally:
            reading.cancel()


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the rounds; what is held against the plain cluster is so in each round."""
    plain = {(row["nodes"], row["round"]): row for row in rows if row["looking"] == PLAIN}
    found = []
    for nodes, looking in dict.fromkeys((row["nodes"], row["looking"]) for row in rows):
        mine = [row for row in rows if (row["nodes"], row["looking"]) == (nodes, looking)]
        beside = [plain[nodes, row["round"]] for row in mine]

        def times(name: str, mine: Sequence[Any] = mine, beside: Sequence[Any] = beside) -> str:
            return str(spread(one[name] / other[name] for one, other in zip(mine, beside, strict=True)))

        found.append(
            {
                "nodes": nodes,
                "looking": looking,
                "tokens/s": statistics.median(row["output_tokens_per_s"] for row in mine),
                "times those of nothing": times("output_tokens_per_s"),
                "TTFT p50 ms": 1e3 * statistics.median(row["ttft_s"].p50 for row in mine),
                "TTFT p99 ms": 1e3 * statistics.median(row["ttft_s"].p99 for row in mine),
                "gateway's CPU ms/request": statistics.median(row["gateway_cpu_ms"] for row in mine),
                "CPU ms/request": statistics.median(row["cpu_ms"] for row in mine),
                "times that of nothing": times("cpu_ms"),
            }
        )
    order = [PLAIN, PAGE, *CLUSTERS]
    return sorted(found, key=lambda row: (row["nodes"], order.index(row["looking"])))
