"""Clusters on this machine: nodes that compute the model, or paced ones; what they can do, and what they did.

`tests/paced` says what is real in a cluster of paced nodes (all but the engines). Its engines only take the
time of a model, so more nodes fit on a host than it has cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from benchmarks import BenchmarkFailed
from benchmarks.core_shares import core_shares
from flowkv.bench.load import Arrival, Lengths, Outcome, drive
from flowkv.local_cluster import Cluster
from flowkv_common.aio import running
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import LoadReport, StepFit
from tests.paced.cluster import kept, paced_cluster, paced_settings, variables
from tests.paced.engine import Kept

READY_TIMEOUT_S = 300.0
# Paced nodes: about what one core does with SmolLM2-135M, 1,000 prompt tokens per second, and 12 decode steps
# per second with 16 sequences.
ONE_CORE = StepFit(
    base_s=0.02, prefill_token_s=0.001, attended_token_s=1e-7, sequence_s=0.004, context_token_s=1e-6
)
CHUNK_TOKENS = 512
MAX_NUM_SEQS = 32
NUM_BLOCKS = 4096
PACED_LIMITS = {"token_budget": CHUNK_TOKENS, "max_num_seqs": MAX_NUM_SEQS}
# With a larger slip the nodes were not what they are said to be: the host was too slow for so many.
MAX_SLIP = 0.05
# No request is refused or delayed for another's target: the engine is measured.
UNBOUNDED = {"ttft_goal_s": 3600, "itl_goal_s": 3600, "max_wait_s": 36000}
SAMPLE_PERIOD_S = 1.0
EVENT_TIMEOUT_S = 10.0

Message = TypeVar("Message", bound=msgspec.Struct)


@dataclass(frozen=True)
class Pace:
    """How well paced nodes kept their pace. `slip`: by which share of the stated time steps were longer."""

    num_steps: int
    slip: float

    @classmethod
    def of(cls, nodes: Iterable[Kept]) -> Pace:
        total = Kept()
        for node in nodes:
            total = Kept(
                total.num_steps + node.num_steps,
                total.stated_s + node.stated_s,
                total.taken_s + node.taken_s,
            )
        return cls(total.num_steps, round(total.slip, 4))

    def __str__(self) -> str:
        return f"{self.slip:+.1%}" + ("" if self.slip <= MAX_SLIP else " NOT KEPT")


@dataclass
class Started:
    """A cluster. `kept` is there when it has ended, by node, if they were paced."""

    cluster: Cluster
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def pace(self) -> Pace | None:
        return Pace.of(self.kept.values()) if self.kept else None


@contextlib.contextmanager
def start_cluster(
    model: str,
    nodes: Mapping[str, int],
    *,
    settings: Mapping[str, object] | None = None,
    fit: StepFit | None = None,
    cores: Mapping[str, set[int]] | None = None,
    core_share: float | None = None,
    num_blocks: int = NUM_BLOCKS,
) -> Iterator[Started]:
    """A cluster that is ready, with so many nodes per role; `settings` are those of all services.

    With `fit` the nodes are paced by it and have pools of `num_blocks`. Without it they compute the model, on
    one thread each unless said otherwise; `cores` may then pin the one node of each role, and `core_share`
    lets each node have so much of a core once it is ready. All else runs where the kernel puts it. Raises
    ClusterError when it does not start, BenchmarkFailed when a thread has strayed.
    """
    with tempfile.TemporaryDirectory(prefix="flowkv-bench-") as folder:
        if fit is not None:
            paced = paced_settings(num_blocks, **(settings or {}))
            with paced_cluster(Path(folder), model, nodes, fit, settings=paced) as cluster:
                started = Started(cluster)
                yield started
            started.kept = kept(Path(folder))
            return
        own = variables(**{"num_threads": 1, **(settings or {})})
        with (
            core_shares(core_share) if core_share else contextlib.nullcontext() as limit,
            Cluster(Path(folder), model, nodes={} if cores else nodes, settings=own) as cluster,
        ):
            pinned = {}
            for role, mine in (cores or {}).items():
                pid = cluster.start_node(role, f"{role}-0").pid
                os.sched_setaffinity(pid, mine)  # before it has threads: they inherit it
                pinned[pid] = mine
            cluster.wait_ready(READY_TIMEOUT_S)
            for pid, mine in pinned.items():
                check_pinned(pid, mine)
            if limit is not None:
                for name, process in cluster.processes.items():
                    if name.startswith(tuple(nodes)):
                        limit(process.pid)
            yield Started(cluster)


def check_pinned(pid: int, cores: set[int]) -> None:
    """Raises BenchmarkFailed if a thread of the process may run on any other core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        actual = os.sched_getaffinity(int(thread.name))
        if not actual <= cores:
            raise BenchmarkFailed(
                f"a thread of process {pid} may run on {sorted(actual)}, not on {sorted(cores)} alone"
            )


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, of user and kernel."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True)
class Capacity:
    """Requests per second that each side serves, its nodes always busy and its steps as full as they get."""

    prefill_per_s: float
    decode_per_s: float

    @property
    def per_s(self) -> float:
        return min(self.prefill_per_s, self.decode_per_s)


def capacity(fit: StepFit, num_prefill: int, num_decode: int, lengths: Lengths) -> Capacity:
    """Of a paced cluster whose nodes keep their roles."""
    num_prompt, num_output, _ = lengths
    num_chunks = num_prompt / min(CHUNK_TOKENS, num_prompt)
    prefill_s = num_chunks * fit.base_s + num_prompt * fit.prefill_token_s
    prefill_s += num_prompt * num_prompt / 2 * fit.attended_token_s
    context = num_prompt + num_output / 2
    step_s = fit.base_s + MAX_NUM_SEQS * (fit.sequence_s + context * fit.context_token_s)
    return Capacity(
        prefill_per_s=num_prefill / prefill_s,
        decode_per_s=num_decode * MAX_NUM_SEQS / (step_s * num_output),
    )


@dataclass
class Observed:
    """`rss_bytes`: by process, once a second. `fits`: by node, as it reported last."""

    num_cap_moves: int = 0  # changes of a prefill chunk budget
    rss_bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    fits: dict[str, StepFit] = field(default_factory=dict)


async def drive_observed(
    cluster: Cluster, arrivals: Iterable[Arrival], seed: int = 0
) -> tuple[list[Outcome], Observed]:
    """`drive`, and meanwhile what nodes report and how much memory processes take."""
    observed = Observed()
    caps: dict[str, int] = {}
    processes = {name: psutil.Process(process.pid) for name, process in cluster.processes.items()}

    def look(report: LoadReport) -> None:
        node_id, cap = report.node.node_id, report.max_prefill_tokens_per_step
        observed.num_cap_moves += caps.setdefault(node_id, cap) != cap
        caps[node_id] = cap
        if report.step is not None:
            observed.fits[node_id] = report.step

    async def sample_memory() -> None:
        while True:
            for name, process in processes.items():
                observed.rss_bytes[name].append(process.memory_info().rss)
            await asyncio.sleep(SAMPLE_PERIOD_S)

    async with connect(cluster.nats_url, name="bench-observe") as bus:
        async with await bus.subscribe(subjects.LOAD_ALL, LoadReport, look), running(sample_memory()):
            return await drive(cluster.url, arrivals, seed=seed), observed


@contextlib.asynccontextmanager
async def listening(
    cluster: Cluster, event: str, kind: type[Message]
) -> AsyncIterator[asyncio.Queue[Message]]:
    """All events of a kind, as they come, until the context ends."""
    events: asyncio.Queue[Message] = asyncio.Queue()

    def hear(message: Message) -> None:
        events.put_nowait(message)

    async with connect(cluster.nats_url, name="bench-events") as bus:
        async with await bus.subscribe(subjects.event(event, ">"), kind, hear):
            yield events


async def event_of(
    events: asyncio.Queue[Message], is_wanted: Callable[[Message], bool] = lambda _: True
) -> Message:
    """The next event that is wanted; others are lost. Raises BenchmarkFailed if none comes."""
    try:
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while not is_wanted(event := await events.get()):
                pass
            return event
    except TimeoutError:
        raise BenchmarkFailed(f"an event that was due has not come for {EVENT_TIMEOUT_S:g} s") from None
