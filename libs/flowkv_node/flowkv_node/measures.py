"""What a node measures of itself: metrics, what an engine step costs, how long outputs become."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from operator import mul
from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram

from flowkv_common.telemetry import process_registry
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import (
    PRIOR_TOKENS,
    BlockCounts,
    OutputForecast,
    StepFit,
    expected_tokens,
    length_class,
    num_attended,
)
from flowkv_engine.engine.batch import WorkItem

# Weight of the newest step in the measured rates: about the last ten steps count.
SMOOTHING = 0.2
# `unneeded`: the first token was the last one, too.
HANDOFF_RESULTS = ("done", "unneeded", "cancelled", "failed")
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TRANSFER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

# Step fit: about so many of the latest steps count.
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

# Output lengths: so many ended outputs of a class are remembered, the latest ones.
MEMORY_OUTPUTS = 64


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

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(name, text, list(mine), registry=self.registry).labels(**mine).set_function(read)

        def usage() -> float:
            now = blocks()
            return (now.leased + now.quarantined) / now.total

        gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage)
        gauge("flowkv_pool_free_blocks", "Blocks free or evictable", lambda: blocks().free + blocks().cached)
        longest = "Blocks of the longest free run"
        gauge("flowkv_pool_longest_free_run", longest, lambda: blocks().longest_free_run)
        per_step = "Prompt tokens per step, at most: what makes a node prefill or decode"
        gauge("flowkv_max_prefill_tokens_per_step", per_step, chunk_budget)

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

    def observe_step(self, counts: StepCounts, duration_s: float) -> None:
        """One engine step: what it computed, and how long it took."""
        total = counts.num_prefill_tokens + counts.num_sequences
        self._step_tokens.observe(total)
        if not counts.num_prefill_tokens:
            predicted_s = self.step_fitter.predict(counts)
            self.step_sizes.observe(counts.num_sequences, duration_s, predicted_s)
        self.step_fitter.observe(counts, duration_s)
        if not counts.num_prefill_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, duration_s)
        elif total >= 16:
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, total / duration_s)

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


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + SMOOTHING * (new - old)


class StepCounts(NamedTuple):
    """What one engine step computes."""

    num_prefill_tokens: int
    num_attended: int  # pairs of a prompt token and a token that it attends to, itself included
    num_sequences: int  # decoding: one token each, and guesses
    num_context_tokens: int  # in the KV caches of those

    @classmethod
    def of(cls, items: Iterable[WorkItem]) -> StepCounts:
        """Of a step that is about to run. One token counts as decoded, for either role; more are a prompt.

        A guess counts as a sequence: it costs as much.
        """
        num_prefill_tokens = attended = num_sequences = num_context_tokens = 0
        for sequence, num_tokens, draft in items:
            num_before = sequence.num_computed_tokens
            for place in range(len(draft)):
                num_sequences += 1
                num_context_tokens += num_before + num_tokens + place
            if num_tokens == 1:
                num_sequences += 1
                num_context_tokens += num_before
            else:
                num_prefill_tokens += num_tokens
                attended += num_attended(num_tokens, num_before)
        return cls(num_prefill_tokens, attended, num_sequences, num_context_tokens)


class StepFitter:
    """Learns a `StepFit` from the steps that run. Pure: no clock, no I/O.

    Least squares that forgets, over five costs, none of them below zero. Only the sums of products are kept,
    5 x 5 numbers, however many steps there were. Errors are relative to a step's time: short steps count as
    much as long ones. A step that takes far too long counts little, as the square of how much, so one alone
    changes nothing. Steps that keep being off shorten the memory. A step changes only the costs of what it
    had: those of prompts stay as they are while there are none.
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
        # Coordinate descent: each cost that the step had is set to its best value, given the others.
        costs, present = self._costs, [i for i, feature in enumerate(features) if feature > 0.0]
        for _ in range(ROUNDS_PER_STEP):
            for i in present:
                row = self._products[i]
                unexplained = self._targets[i] - sum(map(mul, row, costs)) + row[i] * costs[i]
                costs[i] = max(0.0, unexplained / (row[i] * (1.0 + RIDGE)))

    def predict(self, counts: StepCounts) -> float:
        """Seconds that such a step takes; what has never been seen costs nothing."""
        predicted_s: float = sum(map(mul, _features(counts), self._costs))
        return predicted_s

    def fit(self) -> StepFit | None:
        """What is known now; None until there were enough steps."""
        if self._num_steps < MIN_STEPS:
            return None
        costs = (cost / scale for cost, scale in zip(self._costs, _SCALES, strict=True))
        return StepFit(**dict(zip(StepFit.__struct_fields__, costs, strict=True)))


class StepSizes:
    """How far decode steps of so many tokens are off the fit: kernels take rows in tiles, a fit has lines.

    Pure. What was not seen for long counts as the fit says, so that one bad time is not for ever.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._seen: dict[int, tuple[float, int]] = {}  # by size: times the fit, and at which step

    def observe(self, size: int, duration_s: float, predicted_s: float) -> None:
        self._num_steps += 1
        if predicted_s > 0.0:
            # A step that was held up says little of its size.
            times = min(duration_s / predicted_s, 2.0)
            self._seen[size] = _smooth(self._times(size), times), self._num_steps

    def correct(self, size: int, predicted_s: float) -> float:
        """Seconds of such a step, of which the fit says `predicted_s`."""
        return predicted_s * self._times(size)

    def _times(self, size: int) -> float:
        times, seen_at = self._seen.get(size, (1.0, 0))
        return float(1.0 + (times - 1.0) * (1.0 - 1.0 / MEMORY_STEPS) ** (self._num_steps - seen_at))


def _features(counts: StepCounts) -> tuple[float, ...]:
    """1 and the counts, each divided by its scale, in the order of `StepFit`."""
    return tuple(value / scale for value, scale in zip((1, *counts), _SCALES, strict=True))


class OutputLengths:
    """Learns from outputs that have ended, by the length of their prompts; tells of those that run.

    What runs yet says how long outputs become at least: the estimate is that of Kaplan and Meier (JASA 1958).
    """

    def __init__(self) -> None:
        # By class of prompt length the latest outputs: their tokens, and whether they ended by themselves.
        self._ended: defaultdict[int, deque[tuple[int, bool]]] = defaultdict(
            lambda: deque(maxlen=MEMORY_OUTPUTS)
        )

    def observe(self, num_prompt_tokens: int, num_tokens: int, *, stopped: bool) -> None:
        """An output has ended: `stopped` if not by its `max_tokens`. One that was cut off has not ended."""
        self._ended[length_class(num_prompt_tokens)].append((num_tokens, stopped))

    def forecast(self, running: Iterable[tuple[int, int, int]]) -> OutputForecast:
        """Of sequences: the tokens of their prompts, those produced, and how many more they may produce."""
        sequences = list(running)
        known = {key: list(ended) for key, ended in self._ended.items()}
        for num_prompt_tokens, produced, _ in sequences:
            known.setdefault(length_class(num_prompt_tokens), []).append((produced, False))
        # A class begins with one output as long as the mean of all, all together with one of `PRIOR_TOKENS`.
        every = Survival([one for outputs in known.values() for one in outputs] + [(PRIOR_TOKENS, True)])
        prior = round(every.mean), True
        classes = {key: Survival([*outputs, prior]) for key, outputs in known.items()}
        first = min((most for _, _, most in sequences), default=0)
        return OutputForecast(
            tokens_left=round(
                sum(min(most, classes[length_class(p)].left_after(done)) for p, done, most in sequences), 1
            ),
            # All of them together end so many times as often.
            first_ends_in=round(expected_tokens(first, len(sequences) / every.mean), 1),
            stop_rate=round(1.0 / every.mean, 8),
            by_length={
                key: (
                    1 + len(self._ended.get(key, ())),
                    round(survival.mean * (1 + len(self._ended.get(key, ()))), 1),
                )
                for key, survival in classes.items()
            },
        )


class Survival:
    """The share of outputs that become longer than so many tokens, from lengths and whether they ended."""

    def __init__(self, outputs: list[tuple[int, bool]]) -> None:
        # Of those of one length, the ones that go on were still there when the others ended.
        outputs = sorted(outputs, key=lambda output: (output[0], not output[1]))
        num_left, share, area, before = len(outputs), 1.0, 0.0, 0
        self._lengths, self._shares, self._areas = [0], [1.0], [0.0]
        for length, is_end in outputs:
            area += share * (length - before)
            before = length
            if is_end:
                share *= 1.0 - 1.0 / num_left
            num_left -= 1
            self._lengths.append(length)
            self._shares.append(share)
            self._areas.append(area)
        # Nothing is known of what comes after the longest: half as much again.
        self.mean = max(1.0, area + share * before / 2)

    def left_after(self, produced: int) -> float:
        """Tokens that an output still gets that has so many."""
        place = bisect_right(self._lengths, produced) - 1
        share = self._shares[place]
        if share < 1e-9:
            return max(1.0, produced / 2)
        done = self._areas[place] + share * (produced - self._lengths[place])
        return max(1.0, (self.mean - done) / share)
