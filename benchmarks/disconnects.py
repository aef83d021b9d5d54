"""How long blocks stay held after a client has left: `python -m benchmarks.disconnects --json FILE`.

One client at a time leaves at a random moment of its request: while it waits, before the first token, amid
the stream, at its end. The time runs from the closed connection to the first check that finds both nodes
empty.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.result import write_result
from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import Check, Checked

NODES = ("prefill-0", "decode-0")
LONGEST_S = 30.0
LENGTHS = (5, 40, 200, 800)  # prompt tokens


async def is_empty(bus: Bus) -> bool:
    for node_id in NODES:
        held = await bus.request(subjects.at(subjects.NODE_CHECK, node_id), Check(), Checked, timeout_s=5)
        if held.num_requests or held.num_reservations or held.blocks.leased or held.blocks.quarantined:
            return False
    return True


async def leave(http: httpx.AsyncClient, rng: random.Random) -> str:
    """Begin a stream and hang up; returns in which phase."""
    body = {
        "prompt": [rng.randrange(20, 49_000) for _ in range(rng.choice(LENGTHS))],
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    num_tokens = rng.choice((0, 1, 3, 10, 20))
    wait_s = rng.uniform(0.0, 1.0) if num_tokens == 0 else LONGEST_S
    try:
        async with asyncio.timeout(wait_s), http.stream("POST", "/v1/completions", json=body) as response:
            seen = 0
            async for line in response.aiter_lines():
                seen += line.startswith("data: {")
                if seen == num_tokens:
                    break
    except TimeoutError:
        return "before the first token"
    return "at its end" if num_tokens == 20 else "amid the stream"


async def measure(cluster: Cluster, num_clients: int) -> list[tuple[str, float]]:
    rng = random.Random(1)
    times = []
    async with connect(cluster.nats_url, name="bench-disconnects") as bus:
        for _ in range(num_clients):
            # A client of its own each time: what closes is the connection, not a stream in a pool.
            async with httpx.AsyncClient(base_url=cluster.url, timeout=LONGEST_S) as http:
                phase = await leave(http, rng)
            began = time.monotonic()
            async with asyncio.timeout(LONGEST_S):
                while not await is_empty(bus):
                    pass
            times.append((phase, time.monotonic() - began))
    return times


def summarize(times: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Per phase and over all: number, p50, p99 and the longest, in milliseconds."""
    groups: dict[str, list[float]] = {"all": [1e3 * seconds for _, seconds in times]}
    for phase, seconds in times:
        groups.setdefault(phase, []).append(1e3 * seconds)
    return {
        phase: {
            "num": len(values),
            "p50_ms": statistics.median(values),
            "p99_ms": sorted(values)[min(len(values) - 1, int(0.99 * len(values)))],
            "max_ms": max(values),
        }
        for phase, values in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.disconnects")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    prepare = [sys.executable, "-m", "flowkv_engine.engine.fetch"]
    model = subprocess.run(prepare, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")[-2]
    with tempfile.TemporaryDirectory() as folder:
        with Cluster(Path(folder), model, nodes={"prefill": 1, "decode": 1}) as cluster:
            cluster.wait_ready(120)
            summary = summarize(asyncio.run(measure(cluster, options.clients)))
    for phase, row in summary.items():
        print(f"{phase:<24}" + "".join(f"{name} {value:8.1f}  " for name, value in row.items()))
    write_result(options.json, "disconnects", {"summary": summary})


if __name__ == "__main__":
    main()
