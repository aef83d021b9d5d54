"""A made-up service whose traffic shifts: long prompts with short answers, then the reverse, then back.

Of the decode-heavy kind three times as many come, so that all phases cost a node of the presets about the
same time in all: the load stays, and its sides change places.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from benchmarks.traces import TOKENS_PER_HASH_ID, Request


class Phase(NamedTuple):
    """Median lengths in tokens, and requests per second."""

    num_prompt_tokens: int
    num_output_tokens: int
    rate: int


PREFILL_HEAVY = Phase(4000, 64, rate=1)
DECODE_HEAVY = Phase(256, 512, rate=3)
PHASES = (PREFILL_HEAVY, DECODE_HEAVY, PREFILL_HEAVY)
# Of the logarithm of both lengths.
SPREAD = 0.4


def shifting(num_requests: int, seed: int = 0) -> list[Request]:
    """A Poisson process whose phases last equally long. No prefix is shared."""
    draw = random.Random(seed)
    requests = []
    arrival_s = 0.0
    first_id = 0
    by_number = [phase for phase in PHASES for _ in range(phase.rate)]
    for number in range(num_requests):
        phase = by_number[number * len(by_number) // num_requests]
        num_prompt = max(1, round(phase.num_prompt_tokens * draw.lognormvariate(0, SPREAD)))
        num_output = max(1, round(phase.num_output_tokens * draw.lognormvariate(0, SPREAD)))
        num_ids = -(-num_prompt // TOKENS_PER_HASH_ID)
        requests.append(
            Request(num_prompt, num_output, tuple(range(first_id, first_id + num_ids)), arrival_s)
        )
        first_id += num_ids
        arrival_s += draw.expovariate(phase.rate)
    return requests
