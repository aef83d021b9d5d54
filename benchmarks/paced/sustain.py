"""`python -m benchmarks.paced.sustain --json FILE`: the steps per second that one process keeps.

Every decode node always has sequences to step. From row to row its steps get shorter, until the process can't
keep up. Tokens go over NATS to this process, which throws them away: no gateway, no scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from nats.aio.msg import Msg
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.command import Command, Report
from benchmarks.paced.kept import MAX_SLIP
from flowkv.local_cluster import Cluster, ClusterError
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import FlowKVError
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
from tests.paced.cluster import NODES, paced_cluster, paced_settings
from tests.paced.nodes import FINGERPRINT

_NUM_BLOCKS = 8192
_STEPS_S = (0.08, 0.04, 0.02, 0.015, 0.01, 0.005)
_GATEWAY_ID = "sustain"
_PROMPT_TOKENS = 16
_SETTLE_S = 2.0
_REGISTRY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Row:
    """`slip`: by which share steps took longer than `step_s`. `cores`: what the nodes' process used."""

    num_each: int
    step_s: float
    num_sequences: int
    steps_per_s: float
    slip: float
    cores: float
    cpu_ms_per_step: float


async def measure(cluster: Cluster, num_each: int, step_s: float, num_sequences: int, seconds: float) -> Row:
    """`num_sequences` run on each decode node for `seconds`."""
    async with (
        connect(cluster.nats_url, name=_GATEWAY_ID) as bus,
        _keepalives(bus),
        await bus.subscribe_raw(subjects.tokens(_GATEWAY_ID), _throw_away),
    ):
        nodes = await _descriptors(bus, 2 * num_each)
        runs = list(_runs(nodes, num_sequences, max_tokens=int(2 * (seconds + 30) / step_s)))
        for run in runs:
            subject = subjects.at(subjects.PREFILL_RUN, run.node.node_id)
            await bus.request(subject, run, Accepted, timeout_s=5)
        await asyncio.sleep(_SETTLE_S)
        process = psutil.Process(cluster.processes[NODES].pid)
        urls = [node.metrics_url for node in nodes if node.role == "decode"]
        async with httpx.AsyncClient() as http:  # one for both counts: to make it takes long
            began, cpu_before, before = time.monotonic(), _cpu_s(process), await _num_steps(http, urls)
            await asyncio.sleep(seconds)
            ended, cpu_after, after = time.monotonic(), _cpu_s(process), await _num_steps(http, urls)
        for run in runs:
            name = transfer_id(run.request_id, run.attempt)
            await bus.publish(subjects.cancel(name), Cancel(transfer_id=name, reason="measured"))
    wall_s, cpu_s = ended - began, cpu_after - cpu_before
    steps_per_s = (after - before) / wall_s
    slip = num_each / (step_s * steps_per_s) - 1
    return Row(
        num_each=num_each,
        step_s=step_s,
        num_sequences=num_sequences,
        steps_per_s=round(steps_per_s, 1),
        slip=round(slip, 4),
        cores=round(cpu_s / wall_s, 2),
        cpu_ms_per_step=round(1e3 * cpu_s / (after - before), 2),
    )


async def _descriptors(bus: Bus, num_nodes: int) -> list[NodeDescriptor]:
    """Of all nodes, once they are in the registry together. Raises TimeoutError."""
    found: asyncio.Future[list[NodeDescriptor]] = asyncio.get_running_loop().create_future()

    def look(descriptors: Mapping[str, NodeDescriptor]) -> None:
        if len(descriptors) == num_nodes and not found.done():
            found.set_result(list(descriptors.values()))

    async with asyncio.timeout(_REGISTRY_TIMEOUT_S), running(watch_nodes(bus, look)):
        return await found


def _keepalives(bus: Bus) -> Service:
    """Tells the nodes that all their attempts are wanted."""

    async def keepalive(_: Keepalive) -> KeepaliveReply:
        return KeepaliveReply(unknown=[])

    return Service(
        bus,
        name="gateway",
        version="0.0.0",
        service_id=_GATEWAY_ID,
        metadata={},
        endpoints=[Endpoint(subjects.keepalive(_GATEWAY_ID), Keepalive, keepalive)],
    )


async def _throw_away(_: Msg) -> None:
    pass


def _runs(nodes: Sequence[NodeDescriptor], num_sequences: int, max_tokens: int) -> Iterator[PrefillRun]:
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
            gateway_id=_GATEWAY_ID,
            prompt_ids=TokenIds.of([1000 + number] * _PROMPT_TOKENS),
            output_ids=TokenIds.of([]),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            deadline_in_s=600.0,
        )


async def _num_steps(http: httpx.AsyncClient, metrics_urls: Sequence[str]) -> float:
    """Engine steps so far, over all nodes."""
    answers = await asyncio.gather(*(http.get(url) for url in metrics_urls))
    return sum(
        sample.value
        for answer in answers
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_count"
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _run(options: argparse.Namespace, num_each: int, step_s: float) -> Row:
    fit = StepFit(
        base_s=step_s, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
    )
    settings = paced_settings(_NUM_BLOCKS)
    counts = {"prefill": num_each, "decode": num_each}
    with tempfile.TemporaryDirectory(prefix="flowkv-sustain-") as folder:
        with paced_cluster(Path(folder), options.model, counts, fit, settings=settings) as cluster:
            return asyncio.run(measure(cluster, num_each, step_s, options.sequences, options.seconds))


def table(rows: Sequence[Row]) -> str:
    head = (
        f"{'nodes':<8}{'step, ms':>9}{'sequences':>11}{'steps/s':>9}{'slip':>8}{'cores':>7}"
        f"{'CPU, ms/step':>14}"
    )
    lines = [
        f"{f'{row.num_each}P{row.num_each}D':<8}{row.step_s * 1e3:>9.0f}{row.num_sequences:>11}"
        f"{row.steps_per_s:>9.0f}{row.slip:>8.1%}{row.cores:>7.2f}{row.cpu_ms_per_step:>14.2f}"
        for row in rows
    ]
    kept = max((row.steps_per_s for row in rows if row.slip <= MAX_SLIP), default=0.0)
    return "\n".join([head, *lines, f"kept within {MAX_SLIP:.0%}: {kept:.0f} steps/s"])


def main(argv: list[str]) -> int:
    options = _options(argv)
    report = Report("paced.sustain", {"seconds": options.seconds, "sequences_per_node": options.sequences})
    try:
        for num_each in options.nodes:
            for step_s in _STEPS_S:
                report.rows.append(_run(options, num_each, step_s))
                report.say(table(report.rows[-1:]).splitlines()[1])
                report.write(options.json)
    except (ClusterError, TimeoutError, FlowKVError) as error:
        print(error, file=sys.stderr)
        return 1
    return report.end(options.json, table(report.rows))


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("paced.sustain", __doc__)
    parser = command.parser
    parser.add_argument("--nodes", type=int, nargs="+", default=[8], help="of each role")
    parser.add_argument("--sequences", type=int, default=4, help="on each decode node")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    return command.parse(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
