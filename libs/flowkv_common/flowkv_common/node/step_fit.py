"""What an engine step costs on this node, learned from the steps it runs. Pure: no clock, no I/O.

Least squares that forgets, over the five costs of `StepFit`, none of them below zero. Only the sums of
products are kept, 5 x 5 numbers, however many steps there were.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import mul
from typing import NamedTuple

from flowkv_common.engine.batch import WorkItem
from flowkv_common.wire.nodes import StepFit

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
