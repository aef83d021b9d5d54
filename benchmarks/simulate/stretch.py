"""Engine steps of one unchanging batch, in closed form: what a step costs, and where the k-th ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from flowkv_common.wire.nodes import StepFit


def step_s(fit: StepFit, prompt_tokens: int, pairs: int, num_sequences: int, context_tokens: int) -> float:
    """Seconds of one step: the sum that `StepFit` states."""
    return (
        fit.base_s
        + fit.prefill_token_s * prompt_tokens
        + fit.attended_token_s * pairs
        + fit.sequence_s * num_sequences
        + fit.context_token_s * context_tokens
    )


def chunk_pairs(num_computed: int, num_tokens: int) -> int:
    """Pairs of token and context token in a chunk behind `num_computed` tokens; each sees itself too."""
    return num_tokens * num_computed + num_tokens * (num_tokens + 1) // 2


def slowed(fit: StepFit, factor: float) -> StepFit:
    return StepFit(**{name: factor * value for name, value in msgspec.structs.asdict(fit).items()})


class Stretch(NamedTuple):
    """`num_steps` steps in a row with the same sequences and chunk: step j takes `first_s + j x growth_s`."""

    begin_s: float
    first_s: float
    growth_s: float
    num_steps: int
    num_decoding: int
    prompt_tokens: int  # of each step

    @property
    def end_s(self) -> float:
        return self.after(self.num_steps)

    @property
    def last_s(self) -> float:
        """Seconds of the last step."""
        return self.first_s + (self.num_steps - 1) * self.growth_s

    def after(self, num_steps: int) -> float:
        """When `num_steps` steps have ended."""
        return self.begin_s + num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def num_started(self, now: float) -> int:
        """Steps that must end before a change at `now` counts: up to the first border at or after it.

        At least one, since a stretch starts with its first step running; at most all.
        """
        num_steps = min(self.num_steps, max(1, math.ceil(self._root(now - self.begin_s))))
        # The root is exact but for rounding: the borders themselves decide.
        while num_steps > 1 and self.after(num_steps - 1) >= now:
            num_steps -= 1
        while num_steps < self.num_steps and self.after(num_steps) < now:
            num_steps += 1
        return num_steps

    def num_ended(self, now: float) -> int:
        """Steps that have ended at `now`."""
        num_steps = self.num_started(now)
        return num_steps if self.after(num_steps) <= now else num_steps - 1

    def cut(self, num_steps: int) -> Stretch:
        return self._replace(num_steps=num_steps)

    def _root(self, elapsed_s: float) -> float:
        """The real number of steps that take `elapsed_s`; in the form that is stable for any growth."""
        half = self.first_s - self.growth_s / 2
        return (
            2
            * max(0.0, elapsed_s)
            / (half + math.sqrt(half * half + 2 * self.growth_s * max(0.0, elapsed_s)))
        )
