"""Makes engine steps of known cost, to learn it from."""

from __future__ import annotations

import random
from collections.abc import Callable

from flowkv_common.wire.nodes import StepFit
from flowkv_node.measures import StepCounts, StepFitter

# Like a small model on one core.
COSTS = StepFit(
    base_s=0.02,
    prefill_token_s=0.8e-3,
    attended_token_s=1e-7,
    sequence_s=0.5e-3,
    context_token_s=4e-7,
)
MIXED = "pdm"


def duration_s(costs: StepFit, counts: StepCounts) -> float:
    """By the definition of `StepFit`."""
    return (
        costs.base_s
        + costs.prefill_token_s * counts.num_prefill_tokens
        + costs.attended_token_s * counts.num_attended
        + costs.sequence_s * counts.num_sequences
        + costs.context_token_s * counts.num_context_tokens
    )


def make_step(rng: random.Random, kinds: str = MIXED) -> StepCounts:
    """A step with a chunk of a prompt ("p"), with decoding sequences ("d"), or with both ("m")."""
    kind = rng.choice(kinds)
    num_prefill_tokens = num_attended = num_sequences = num_context_tokens = 0
    if kind in "pm":
        num_prefill_tokens, num_before = rng.randrange(2, 513), rng.randrange(2000)
        num_attended = num_prefill_tokens * num_before + num_prefill_tokens * (num_prefill_tokens + 1) // 2
    if kind in "dm":
        num_sequences = rng.randrange(1, 33)
        num_context_tokens = sum(rng.randrange(20, 2000) for _ in range(num_sequences))
    return StepCounts(num_prefill_tokens, num_attended, num_sequences, num_context_tokens)


def run_steps(
    fitter: StepFitter,
    num_steps: int,
    rng: random.Random,
    *,
    costs: StepFit = COSTS,
    make: Callable[[random.Random], StepCounts] = make_step,
    noise: float = 0.03,
) -> None:
    """Let the fitter see steps of `costs`; `noise` is the relative error of most of them."""
    for _ in range(num_steps):
        counts = make(rng)
        fitter.observe(counts, duration_s(costs, counts) * rng.lognormvariate(0.0, noise))


def worst_error(
    fitter: StepFitter,
    rng: random.Random,
    *,
    costs: StepFit = COSTS,
    make: Callable[[random.Random], StepCounts] = make_step,
) -> float:
    """The largest relative error over 100 steps that the fitter has not seen."""
    steps = [make(rng) for _ in range(100)]
    return max(abs(fitter.predict(counts) / duration_s(costs, counts) - 1.0) for counts in steps)
