"""A node's metrics, and the rates that it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram

from flowkv_common.telemetry import process_registry
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import BlockCounts
from flowkv_node.measures import StepCounts, StepFitter, StepSizes, smooth

# `unneeded`: the first token was the last one, too.
HANDOFF_RESULTS = ("done", "unneeded", "cancelled", "failed")
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TRANSFER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Instruments:
    """The node's metrics. Label `model_name` as vLLM's dashboards expect, `node_id` for ours."""

    def __init__(
        self,
        model_name: str,
        node_id: str,
        connectors: Iterable[str],
        blocks: Callable[[], BlockCounts],
        chunk_budget: Callable[[], int],
    ) -> None:
        """What each of `connectors` has moved begins at 0, not with its first transfer.

        `blocks` and `chunk_budget` are asked when the gauges are read.
        """
        self.registry = process_registry()
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.step_fitter = StepFitter()
        self.step_sizes = StepSizes()
        self._labels = mine = {"model_name": model_name, "node_id": node_id}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [*labels, *mine], registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, [*labels, *mine], buckets=buckets, registry=self.registry)

        def usage() -> float:
            now = blocks()
            return (now.leased + now.quarantined) / now.total

        self.add_gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage)
        self.add_gauge(
            "flowkv_pool_free_blocks", "Blocks free or evictable", lambda: blocks().free + blocks().cached
        )
        longest = "Blocks of the longest free run"
        self.add_gauge("flowkv_pool_longest_free_run", longest, lambda: blocks().longest_free_run)
        per_step = "Prompt tokens per step, at most: what makes a node prefill or decode"
        self.add_gauge("flowkv_max_prefill_tokens_per_step", per_step, chunk_budget)

        steps = histogram("vllm:iteration_tokens_total", "Tokens per step", STEP_BUCKETS)
        preemptions = counter("vllm:num_preemptions", "Sequences preempted, to be recomputed")
        changes = counter("flowkv_cap_changes", "Times that the prefill chunk budget was changed")
        handoffs = counter("flowkv_handoffs", "Handoffs by result", "result")
        self._step_tokens = steps.labels(**mine)
        self.preemptions = preemptions.labels(**mine)
        self.chunk_budget_changes = changes.labels(**mine)
        drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed and computed")
        accepted = counter("vllm:spec_decode_num_accepted_tokens", "Of those, right ones")
        self._drafted, self._accepted = drafted.labels(**mine), accepted.labels(**mine)
        self.handoffs = {result: handoffs.labels(result=result, **mine) for result in HANDOFF_RESULTS}

        def seconds(name: str, text: str) -> Histogram:
            return histogram(name, text, TRANSFER_BUCKETS, "connector")

        # By field of `KVTransferred`, so that event and metrics agree.
        self._transfers: dict[str, Histogram | Counter] = {
            "total_s": seconds("flowkv_kv_transfer_seconds", "A request's KV transfer: time spent sending"),
            "hidden_s": seconds("flowkv_kv_transfer_hidden_seconds", "Of that, while chunks were computing"),
            "exposed_s": seconds("flowkv_kv_transfer_exposed_seconds", "Of that, after the last chunk"),
            "num_bytes": counter("flowkv_kv_transfer_bytes", "Bytes of KV sent", "connector"),
            "num_copies": counter("flowkv_kv_transfer_copies", "Copies, after alignment", "connector"),
            "num_calls": counter("flowkv_kv_transfer_calls", "Calls that the transport made", "connector"),
        }
        for connector in connectors:
            for family in self._transfers.values():
                family.labels(connector=connector, **mine)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """`read` is asked at each scrape."""
        gauge = Gauge(name, text, list(self._labels), registry=self.registry)
        gauge.labels(**self._labels).set_function(read)

    def observe_step(self, counts: StepCounts, duration_s: float) -> None:
        """One engine step: what it computed, and how long it took."""
        total = counts.num_prefill_tokens + counts.num_sequences
        self._step_tokens.observe(total)
        if not counts.num_prefill_tokens:
            predicted_s = self.step_fitter.predict(counts)
            self.step_sizes.observe(counts.num_sequences, duration_s, predicted_s)
        self.step_fitter.observe(counts, duration_s)
        if not counts.num_prefill_tokens:
            self.decode_step_s = smooth(self.decode_step_s, duration_s)
        elif total >= 16:
            self.prefill_tokens_per_s = smooth(self.prefill_tokens_per_s, total / duration_s)

    def observe_draft(self, num_drafted: int, num_accepted: int) -> None:
        """What a step has guessed of a sequence, and how much of it was right."""
        if num_drafted:
            self._drafted.inc(num_drafted)
            self._accepted.inc(num_accepted)

    def expected_step_s(self, counts: StepCounts) -> float | None:
        """What such a step should take; None until there were enough steps like it to tell."""
        fit = self.step_fitter.fit()
        if fit is None or (counts.num_prefill_tokens and not fit.prefill_token_s + fit.attended_token_s):
            return None
        return self.step_fitter.predict(counts)

    def observe_transfer(self, event: KVTransferred) -> None:
        for field, family in self._transfers.items():
            metric = family.labels(connector=event.connector, **self._labels)
            if isinstance(metric, Histogram):
                metric.observe(getattr(event, field))
            else:
                metric.inc(getattr(event, field))
