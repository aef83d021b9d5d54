"""The steps per second that one process of paced nodes keeps on this machine.

Every decode node always has sequences to step. From row to row its steps get shorter, until the process can't
keep up. Tokens go over NATS to this process, which throws them away: no gateway, no scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

from nats.aio.msg import Msg

from benchmarks.clusters import MAX_SLIP, Pace, cpu_s, start_cluster
from benchmarks.report import Report, make_parser
from flowkv.local_cluster import Cluster
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Cancel,
    Keepalive,
    KeepaliveReply,
    PrefillRun,
    SamplingParams,
    TokenIds,
    transfer_id,
)
from flowkv_common.wire.nodes import NodeDescriptor, StepFit
from tests.paced.cluster import NODES
from tests.paced.nodes import FINGERPRINT

NUM_BLOCKS = 8192
STEPS_S = (0.08, 0.04, 0.02, 0.015, 0.01, 0.005)
GATEWAY_ID = "sustain"
PROMPT_TOKENS = 16
SETTLE_S = 2.0
REGISTRY_TIMEOUT_S = 30.0


def main(argv: Sequence[str]) -> int:
    parser = make_parser("sustain", __doc__, model=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8], help="of each role")
    parser.add_argument("--sequences", type=int, default=4, help="on each decode node")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    options = parser.parse_args(argv)
    report = Report(options)
    for num_each, step_s in itertools.product(options.nodes, STEPS_S):
        nodes = {"prefill": num_each, "decode": num_each}
        fit = StepFit(
            base_s=step_s, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
        )
        with start_cluster(options.model, nodes, fit=fit, num_blocks=NUM_BLOCKS) as started:
            cores = asyncio.run(measure(started.cluster, 2 * num_each, step_s, options))
        decode = [kept for name, kept in started.kept.items() if name.startswith("decode")]
        steps_per_s = sum(kept.num_steps / kept.taken_s for kept in decode)
        report.add_row(
            cluster=f"{num_each}P{num_each}D",
            step_s=step_s,
            steps_per_s=round(steps_per_s, 1),
            slip=Pace.of(decode).slip,
            cores=round(cores, 2),  # of the nodes' process
            cpu_ms_per_step=round(1e3 * cores / steps_per_s, 2),
        )
    best = max((row["steps_per_s"] for row in report.rows if row["slip"] <= MAX_SLIP), default=0.0)
    print(f"kept within {MAX_SLIP:.0%}: {best:.0f} steps/s")
    return report.finish("cluster", "step_s", "steps_per_s", "slip", "cores", "cpu_ms_per_step")


async def measure(cluster: Cluster, num_nodes: int, step_s: float, options: argparse.Namespace) -> float:
    """Keeps each decode node busy for a while; the cores that the nodes used meanwhile."""
    async with (
        connect(cluster.nats_url, name=GATEWAY_ID) as bus,
        keepalives(bus),
        await bus.subscribe_raw(subjects.tokens(GATEWAY_ID), throw_away),
    ):
        nodes = await descriptors_of(bus, num_nodes)
        runs = list(prefill_runs(nodes, options.sequences, int(2 * (options.seconds + 30) / step_s)))
        for run in runs:
            subject = subjects.at(subjects.PREFILL_RUN, run.node.node_id)
            await bus.request(subject, run, Accepted, timeout_s=5)
        await asyncio.sleep(SETTLE_S)
        pid = cluster.processes[NODES].pid
        began, cpu_before_s = time.monotonic(), cpu_s(pid)
        await asyncio.sleep(options.seconds)
        cores = (cpu_s(pid) - cpu_before_s) / (time.monotonic() - began)
        for run in runs:
            name = transfer_id(run.request_id, run.attempt)
            await bus.publish(subjects.cancel(name), Cancel(transfer_id=name, reason="measured"))
    return cores


async def descriptors_of(bus: Bus, num_nodes: int) -> list[NodeDescriptor]:
    """Of all nodes, once they are in the registry together. Raises TimeoutError."""
    found: asyncio.Future[list[NodeDescriptor]] = asyncio.get_running_loop().create_future()

    def look(descriptors: Mapping[str, NodeDescriptor]) -> None:
        if len(descriptors) == num_nodes and not found.done():
            found.set_result(list(descriptors.values()))

    async with asyncio.timeout(REGISTRY_TIMEOUT_S), running(watch_nodes(bus, look)):
        return await found


def keepalives(bus: Bus) -> Service:
    """Tells the nodes that all their attempts are wanted."""

    async def answer(_: Keepalive) -> KeepaliveReply:
        return KeepaliveReply(unknown=[])

    endpoint = Endpoint(subjects.keepalive(GATEWAY_ID), Keepalive, answer)
    return Service(bus, name="gateway", version="0.0.0", service_id=GATEWAY_ID, endpoints=[endpoint])


async def throw_away(_: Msg) -> None:
    pass


def prefill_runs(
    nodes: Sequence[NodeDescriptor], num_sequences: int, max_tokens: int
) -> Iterator[PrefillRun]:
    """From each prefill node to its decode node."""
    refs = {node.node.node_id: node.node for node in nodes}
    for i, number in itertools.product(range(len(nodes) // 2), range(num_sequences)):
        yield PrefillRun(
            request_id=f"{i}-{number}",
            attempt=0,
            epoch=1,
            node=refs[f"prefill-{i}"],
            fingerprint=FINGERPRINT,
            decode=refs[f"decode-{i}"],
            gateway_id=GATEWAY_ID,
            prompt_ids=TokenIds.of([1000 + number] * PROMPT_TOKENS),
            output_ids=TokenIds.of([]),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            deadline_in_s=600.0,
        )
