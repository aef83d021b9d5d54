"""What users are to see, as multiples of what an idle cluster would give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulate.life import Life
from benchmarks.simulate.presets import NodeKind
from benchmarks.simulate.stretch import chunk_pairs, step_s
from benchmarks.traces import Request

TTFT_FACTOR = 3.0
TTFT_EXTRA_S = 0.25
TPOT_FACTOR = 2.0
TTFT_QUANTILE = 0.9


class Targets(NamedTuple):
    """Seconds. A request is good when it meets both."""

    ttft_s: float
    tpot_s: float

    def are_met(self, life: Life) -> bool:
        return life.is_done and life.ttft_s <= self.ttft_s and life.tpot_s <= self.tpot_s


def default_targets(kind: NodeKind, requests: Sequence[Request]) -> Targets:
    """TTFT: 3 x that of the p90 prompt on an idle node, and 0.25 s. TPOT: 2 x a step of one sequence of mean
    length."""
    prompts = sorted(request.num_prompt_tokens for request in requests)
    long_prompt = prompts[min(len(prompts) - 1, int(TTFT_QUANTILE * len(prompts)))]
    mean_context = sum(r.num_prompt_tokens + r.num_output_tokens / 2 for r in requests) / len(requests)
    return Targets(
        TTFT_FACTOR * unloaded_prefill_s(kind, long_prompt) + TTFT_EXTRA_S,
        TPOT_FACTOR * step_s(kind.fit, 0, 0, 1, round(mean_context)),
    )


def unloaded_prefill_s(kind: NodeKind, num_tokens: int) -> float:
    """Seconds of a prompt alone on a node, nothing of it cached."""
    num_steps = -(-num_tokens // kind.token_budget)
    whole = step_s(kind.fit, num_tokens, chunk_pairs(0, num_tokens), 0, 0)
    return whole + (num_steps - 1) * kind.fit.base_s
