"""What a node learns of its work: what an engine step costs, how long outputs become."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from flowkv_common.wire.nodes import (
    PRIOR_TOKENS,
    OutputForecast,
    StepFit,
    expected_tokens,
    length_class,
    num_attended,
)

if TYPE_CHECKING:  # the simulator fits steps, too, and loads no torch
    from flowkv_engine.engine.batch import WorkItem

# Weight of the newest step in measured rates: about the last ten steps count.
SMOOTHING = 0.2

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


def smooth(old: float, new: float) -> float:
    """`old` is 0 until something was measured."""
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
            self._seen[size] = smooth(self._times(size), times), self._num_steps

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
