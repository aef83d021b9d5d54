"""What a node measures of itself: Prometheus metrics, and what its load reports say of its speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import Counter, Gauge, Histogram

from flowkv_common.metrics import process_registry
from flowkv_common.node.step_fit import StepCounts, StepFitter
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import BlockCounts

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

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
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

    def expect_connectors(self, names: Sequence[str]) -> None:
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
