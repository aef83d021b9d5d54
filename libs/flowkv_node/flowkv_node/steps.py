"""What an engine step costs on this node, learned from the steps it runs. Pure: no clock, no I/O.

Least squares that forgets, over the five costs of `StepFit`, none of them below zero. Only the sums of
products are kept, 5 x 5 numbers, however many steps there were.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import Counter, Gauge, Histogram

from flowkv_common.errors import Internal
from flowkv_common.telemetry import process_registry
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import BlockCounts, StepFit
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from flowkv_engine.engine.runner import DeviceLost, Engine, Result
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.kv.blocks import Blocks
from flowkv_node.outbox import Outbox

# About so many of the latest steps count.
MEMORY_STEPS = 200
# A step that is off by all of its time makes the rest count so many times less: hardware changes its speed.
HASTE = 20.0
# Fewer steps than this say nothing; the first one may have compiled something.
MIN_STEPS = 10
# Share by which a cost is pulled to zero. Where steps look all alike, it divides their time evenly.
RIDGE = 1e-3
# The fit goes on from the last one, so few rounds per step are enough.
ROUNDS_PER_STEP = 3

# One of each is about as much work: 1 step, 64 prompt tokens, each of them with 256 to attend to, ...
_SCALES = (1.0, 64.0, 64.0 * 256.0, 8.0, 8.0 * 512.0)


class StepCounts(NamedTuple):
    """What one engine step computes."""

    num_prefill_tokens: int
    num_attended: int  # pairs of a prompt token and a token that it attends to, itself included
    num_sequences: int  # decoding: one token each
    num_context_tokens: int  # in the KV caches of those

    @classmethod
    def of(cls, items: Iterable[WorkItem]) -> StepCounts:
        """Of a step that is about to run. One token is decoded, whoever asked for it; more are a prompt."""
        num_prefill_tokens = num_attended = num_sequences = num_context_tokens = 0
        for sequence, num_tokens in items:
            num_before = sequence.num_computed_tokens
            if num_tokens == 1:
                num_sequences += 1
                num_context_tokens += num_before
            else:
                num_prefill_tokens += num_tokens
                num_attended += num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
        return cls(num_prefill_tokens, num_attended, num_sequences, num_context_tokens)


class StepFitter:
    """Learns a `StepFit`. Errors are relative to a step's time: short steps count as much as long ones.

    A step that takes far too long counts little, as the square of how much, so one alone changes nothing.
    Steps that keep being off shorten the memory. A step changes only the costs of what it had: those of
    prompts stay as they are while there are none.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._costs = [0.0] * len(_SCALES)  # seconds per scale
        self._products = [[0.0] * len(_SCALES) for _ in _SCALES]  # of features with each other
        self._targets = [0.0] * len(_SCALES)  # of features with the time

    def observe(self, counts: StepCounts, duration_s: float) -> None:
        """One step has taken so long. Costs some 20 microseconds."""
        features = _features(counts)
        predicted_s = self.predict(counts)
        longer_s = max(duration_s, predicted_s, 1e-9)
        surprise = (duration_s - predicted_s) / longer_s  # -1 to 1
        keep = 1.0 - (1.0 + HASTE * surprise * surprise) / MEMORY_STEPS
        weight = 1.0 / (longer_s * longer_s)
        for i, feature in enumerate(features):
            weighted = feature * weight
            self._products[i] = [
                keep * old + weighted * other for old, other in zip(self._products[i], features, strict=True)
            ]
            self._targets[i] = keep * self._targets[i] + weighted * duration_s
        self._num_steps += 1
        self._solve([i for i, feature in enumerate(features) if feature > 0.0])

    def predict(self, counts: StepCounts) -> float:
        """Seconds that such a step takes; what has never been seen costs nothing."""
        predicted_s: float = sum(map(mul, _features(counts), self._costs))
        return predicted_s

    def fit(self) -> StepFit | None:
        """What is known now; None until there were enough steps."""
        if self._num_steps < MIN_STEPS:
            return None
        base_s, token_s, attended_s, sequence_s, context_s = (
            cost / scale for cost, scale in zip(self._costs, _SCALES, strict=True)
        )
        return StepFit(
            base_s=base_s,
            prefill_token_s=token_s,
            attended_token_s=attended_s,
            sequence_s=sequence_s,
            context_token_s=context_s,
        )

    def _solve(self, present: list[int]) -> None:
        """Coordinate descent: each cost in turn is set to its best value, given the others."""
        costs = self._costs
        for _ in range(ROUNDS_PER_STEP):
            for i in present:
                row = self._products[i]
                unexplained = self._targets[i] - sum(map(mul, row, costs)) + row[i] * costs[i]
                costs[i] = max(0.0, unexplained / (row[i] * (1.0 + RIDGE)))


def _features(counts: StepCounts) -> tuple[float, ...]:
    """1 and the counts, each divided by its scale."""
    return tuple(value / scale for value, scale in zip((1, *counts), _SCALES, strict=True))


# Weight of the newest step in the measured rates: about the last ten steps count.
SMOOTHING = 0.2

# `unneeded`: the first token was the last one, too.
HANDOFF_RESULTS = ("done", "unneeded", "cancelled", "failed")

_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_TRANSFER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Instruments:
    """The node's own registry. Label `model_name` as vLLM's dashboards expect, `node_id` for ours."""

    def __init__(self, model_name: str, node_id: str) -> None:
        self.registry = process_registry()
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.step_fitter = StepFitter()
        self._labels = {"model_name": model_name, "node_id": node_id}
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens per step", _STEP_BUCKETS)
        self._preemptions = self._counter("vllm:num_preemptions", "Sequences preempted, to be recomputed")
        self._cap_changes = self._counter("flowkv_cap_changes", "Times that the prefill cap was moved")
        self._transfer_s = self._durations(
            "flowkv_kv_transfer_seconds", "A request's KV transfer: time spent sending"
        )
        self._transfer_hidden_s = self._durations(
            "flowkv_kv_transfer_hidden_seconds", "Of that, while chunks were still computing"
        )
        self._transfer_exposed_s = self._durations(
            "flowkv_kv_transfer_exposed_seconds", "Of that, after the last chunk"
        )
        self._transfer_bytes = self._per_connector("flowkv_kv_transfer_bytes", "Bytes of KV sent")
        self._transfer_copies = self._per_connector("flowkv_kv_transfer_copies", "Copies, after alignment")
        self._transfer_calls = self._per_connector(
            "flowkv_kv_transfer_calls", "Calls that the transport made"
        )
        self._handoffs = Counter(
            "flowkv_handoffs", "Handoffs by result", ["result", *self._labels], registry=self.registry
        )
        for result in HANDOFF_RESULTS:
            self._handoffs.labels(result=result, **self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: SequenceOf[float]) -> Histogram:
        made = Histogram(name, text, list(self._labels), buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def _durations(self, name: str, text: str) -> Histogram:
        labels = ["connector", *self._labels]
        return Histogram(name, text, labels, buckets=_TRANSFER_BUCKETS, registry=self.registry)

    def _per_connector(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["connector", *self._labels], registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when somebody asks."""
        made = Gauge(name, text, list(self._labels), registry=self.registry)
        made.labels(**self._labels).set_function(read)

    def block_gauges(self, counts: Callable[[], BlockCounts]) -> None:
        """The pool: use as vLLM counts it, and how long its free runs are."""

        def usage() -> float:
            now = counts()
            return (now.leased + now.quarantined) / now.total

        self.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage)
        self.gauge(
            "flowkv_pool_free_blocks", "Blocks free or evictable", lambda: counts().free + counts().cached
        )
        self.gauge(
            "flowkv_pool_longest_free_run",
            "Blocks of the longest free run",
            lambda: counts().longest_free_run,
        )

    def observe_step(self, counts: StepCounts, duration_s: float) -> None:
        """One engine step: what it computed, and how long it took."""
        total = counts.num_prefill_tokens + counts.num_sequences
        self._step_tokens.observe(total)
        self.step_fitter.observe(counts, duration_s)
        if not counts.num_prefill_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, duration_s)
        elif total >= 16:
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, total / duration_s)

    def count_preemption(self) -> None:
        self._preemptions.inc()

    def count_cap_change(self) -> None:
        self._cap_changes.inc()

    def count_handoff(self, result: str) -> None:
        self._handoffs.labels(result=result, **self._labels).inc()

    def expect_connectors(self, names: SequenceOf[str]) -> None:
        """What each of them has moved begins at 0, not with its first transfer."""
        for name in names:
            for family in (
                self._transfer_s,
                self._transfer_hidden_s,
                self._transfer_exposed_s,
                self._transfer_bytes,
                self._transfer_copies,
                self._transfer_calls,
            ):
                family.labels(connector=name, **self._labels)

    def observe_transfer(self, event: KVTransferred) -> None:
        """Counts what the event tells: both agree."""
        labels = {"connector": event.connector, **self._labels}
        self._transfer_s.labels(**labels).observe(event.total_s)
        self._transfer_hidden_s.labels(**labels).observe(event.hidden_s)
        self._transfer_exposed_s.labels(**labels).observe(event.exposed_s)
        self._transfer_bytes.labels(**labels).inc(event.num_bytes)
        self._transfer_copies.labels(**labels).inc(event.num_copies)
        self._transfer_calls.labels(**labels).inc(event.num_calls)


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + SMOOTHING * (new - old)


if TYPE_CHECKING:
    from flowkv_node.node import Guest

log = logging.getLogger(__name__)


class Retire:
    """Frees blocks of sequences, never while a step may still write them (docs/architecture.md, rule 3).

    `moved_at` is when a step last ended or room last came back, on the monotonic clock.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.moved_at = time.monotonic()
        self._blocks = blocks
        self._in_step: set[int] = set()
        self._after_step: list[list[int]] = []
        self._freed = asyncio.Event()

    def __call__(self, sequence: Sequence) -> None:
        """The sequence gives its blocks back: now, or when the step that holds it has ended."""
        block_ids, sequence.block_table = sequence.block_table, []
        sequence.num_computed_tokens = sequence.num_committed_blocks = 0
        if id(sequence) in self._in_step:
            self._after_step.append(block_ids)
        else:
            self._release(block_ids)

    def notice_room(self) -> None:
        """Somebody else has freed blocks: who waits for room looks again."""
        self.moved_at = time.monotonic()
        self._freed.set()

    async def wait_for_room(self, timeout_s: float) -> None:
        """Until some blocks were freed, or `timeout_s`: others than sequences free blocks too."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._freed.wait()

    def step_begins(self, sequences: Iterable[Sequence]) -> None:
        self._in_step = {id(sequence) for sequence in sequences}

    def step_ended(self) -> None:
        self.moved_at = time.monotonic()
        self._in_step = set()
        held, self._after_step = self._after_step, []
        for block_ids in held:
            self._release(block_ids)

    def _release(self, block_ids: list[int]) -> None:
        self._blocks.release(block_ids)
        self.notice_room()


class Steps:
    """Runs the engine for the guests, in the order decode first, then prefill under the cap."""

    def __init__(
        self,
        engine: Engine,
        guests: Callable[[], Iterable[Guest]],
        outbox: Outbox,
        retire: Retire,
        instruments: Instruments,
        *,
        block_size: int,
        token_budget: int,
        max_prefill_tokens_per_step: int,
        wake: asyncio.Event,
    ) -> None:
        self.max_prefill_tokens_per_step = max_prefill_tokens_per_step
        self._engine = engine
        self._guests = guests
        self._outbox = outbox
        self._retire = retire
        self._instruments = instruments
        self._block_size = block_size
        self._token_budget = token_budget
        self._wake = wake

    async def run(self) -> None:
        """Step after step, until cancelled; sleeps while no guest wants anything. Raises `DeviceLost`."""
        while True:
            self._wake.clear()
            work = self._plan()
            if not work:
                await self._outbox.flush()
                await self._wake.wait()
                continue
            await self._step(work)

    def _plan(self) -> list[tuple[Guest, WorkItem]]:
        guests = list(self._guests())
        work = [(guest, item) for guest in guests for item in guest.decode_work()]
        room = min(self._token_budget - len(work), self.max_prefill_tokens_per_step)
        # The floor of one block: waiting prompts, such as a preempted sequence, always proceed.
        room = max(room, self._block_size)
        for guest in guests:
            items = guest.prefill_work(room)
            work += [(guest, item) for item in items]
            room -= sum(item.num_tokens for item in items)
        return work

    async def _step(self, work: list[tuple[Guest, WorkItem]]) -> None:
        items = [item for _, item in work]
        batch = pack(items, self._block_size)
        counts = StepCounts.of(items)  # before the step: a cancel during it makes a sequence forget
        self._retire.step_begins(item.sequence for item in items)
        began = time.monotonic()
        try:
            sampled = await self._compute(batch)
        except DeviceLost:
            raise
        except Exception as error:
            # A step that fails costs the requests in it their attempt, never the process.
            log.exception("an engine step failed")
            self._retire.step_ended()
            for guest, item in work:
                guest.fail(item.sequence, Internal(f"the engine step failed: {error}"))
            return
        self._retire.step_ended()
        self._instruments.observe_step(counts, time.monotonic() - began)
        for (guest, item), token in zip(work, sampled, strict=True):
            if item.sequence.block_table:  # else it was cancelled during the step
                item.sequence.num_computed_tokens += item.num_tokens
                guest.apply(item.sequence, token)

    async def _compute(self, batch: PackedBatch) -> Result:
        """Runs the batch; meanwhile what the last step gave goes out. Raises what the step raises."""
        failed: Exception | None = None
        sampled: Result = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.flush())  # begins when the batch has been handed over
            try:
                sampled = await self._engine.step(batch)
            except Exception as error:  # not as a group: it is one step's error
                failed = error
        if failed:
            raise failed
        return sampled
