"""The pace of the nodes, and what a cluster of them can do at best. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from benchmarks.load.arrivals import Lengths
from flowkv_common.wire.nodes import StepFit

# About what one core does with SmolLM2-135M: 1,000 prompt tokens per second; 12 decode steps per second with
# 16 sequences.
ONE_CORE = StepFit(
    base_s=0.02, prefill_token_s=0.001, attended_token_s=1e-7, sequence_s=0.004, context_token_s=1e-6
)
CHUNK_TOKENS = 512
MAX_NUM_SEQS = 32
NUM_BLOCKS = 4096


@dataclass(frozen=True)
class Capacity:
    """Requests per second that each side serves, its nodes always busy and its steps as full as they get."""

    prefill_per_s: float
    decode_per_s: float

    @property
    def per_s(self) -> float:
        return min(self.prefill_per_s, self.decode_per_s)


def capacity(fit: StepFit, num_prefill: int, num_decode: int, lengths: Lengths) -> Capacity:
    """Of a cluster whose nodes keep their roles."""
    num_prompt, num_output, _ = lengths
    chunk = min(CHUNK_TOKENS, num_prompt)
    num_chunks = num_prompt / chunk
    prefill_s = (
        num_chunks * fit.base_s
        + num_prompt * fit.prefill_token_s
        + num_prompt * num_prompt / 2 * fit.attended_token_s
    )
    context = num_prompt + num_output / 2
    step_s = fit.base_s + MAX_NUM_SEQS * (fit.sequence_s + context * fit.context_token_s)
    return Capacity(
        prefill_per_s=num_prefill / prefill_s,
        decode_per_s=num_decode * MAX_NUM_SEQS / (step_s * num_output),
    )


def stretched(fit: StepFit, factor: float) -> StepFit:
    """Nodes that are so many times slower: more of them fit on a host."""
    return StepFit(**{name: factor * seconds for name, seconds in msgspec.structs.asdict(fit).items()})
