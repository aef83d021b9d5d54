"""How long blocks stay held after a client has left.

One client at a time leaves at a random moment of its request: while it waits, before the first token, amid
the stream, at its end. The time runs from the closed connection to the first check that finds both nodes
empty.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.clusters import start_cluster
from benchmarks.report import Report, make_parser, quantiles
from flowkv.bench.load import connection, read_events, request_bytes
from flowkv.bench.traces import TOKEN_IDS
from flowkv.local_cluster import Cluster
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import Check, Checked

NODES = ("prefill-0", "decode-0")
LONGEST_S = 30.0
LENGTHS = (5, 40, 200, 800)  # prompt tokens
MAX_TOKENS = 20


def main(argv: Sequence[str]) -> int:
    parser = make_parser("disconnects", __doc__, model=True)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args(argv)
    report = Report(options, unit="ms")
    with start_cluster(options.model, {"prefill": 1, "decode": 1}) as started:
        times = asyncio.run(measure(started.cluster, options.clients))
    for phase in ["all", *dict.fromkeys(phase for phase, _ in times)]:
        held = quantiles(1e3 * seconds for each, seconds in times if phase in ("all", each))
        report.add_row(client_left=phase, times=held.num, held_ms=held, longest_ms=held.max)
    return report.finish("client_left", "times", "held_ms", "longest_ms")


async def measure(cluster: Cluster, num_clients: int) -> list[tuple[str, float]]:
    """The phase in which each client left, and the seconds until both nodes were empty."""
    rng = random.Random(1)
    times = []
    async with connect(cluster.nats_url, name="bench-disconnects") as bus:
        for _ in range(num_clients):
            phase = await leave(cluster.url, rng)
            began = time.monotonic()
            async with asyncio.timeout(LONGEST_S):
                while not await is_empty(bus):
                    pass
            times.append((phase, time.monotonic() - began))
    return times


async def leave(url: str, rng: random.Random) -> str:
    """Begin a stream and hang up; in which phase."""
    prompt_ids = rng.choices(TOKEN_IDS, k=rng.choice(LENGTHS))
    num_events = rng.choice((0, 1, 3, 10, MAX_TOKENS))
    wait_s = rng.uniform(0.0, 1.0) if num_events == 0 else LONGEST_S
    try:
        async with asyncio.timeout(wait_s), connection(url) as (reader, writer):
            writer.write(request_bytes(url, prompt_ids, MAX_TOKENS))
            await reader.readuntil(b"\r\n\r\n")
            seen = 0
            async for _ in read_events(reader):
                seen += 1
                if seen == num_events:
                    break
    except TimeoutError:
        return "before the first token"
    return "at its end" if num_events == MAX_TOKENS else "amid the stream"


async def is_empty(bus: Bus) -> bool:
    for node_id in NODES:
        held = await bus.request(subjects.at(subjects.NODE_CHECK, node_id), Check(), Checked, timeout_s=5)
        if held.num_requests or held.num_reservations or held.blocks.leased or held.blocks.quarantined:
            return False
    return True
