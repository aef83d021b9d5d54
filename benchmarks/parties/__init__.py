"""One program per engine: it reads one job a line on stdin and answers each with its seconds, a line each.

Needs the standard library only: each engine has its own environment.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

Prompts = list[list[int]]
# Ordinary tokens in the vocabulary of any model.
TOKEN_IDS = range(1000, 30_000)


@dataclass(frozen=True)
class Job:
    """Decode: `batch` sequences of `context` tokens go on by `num_steps`. Prefill (`batch` 0): one prompt."""

    batch: int
    context: int
    num_steps: int = 1

    @property
    def is_decode(self) -> bool:
        return self.batch > 0

    @property
    def title(self) -> str:
        return f"decode {self.batch} x {self.context}" if self.is_decode else f"prefill {self.context}"

    def prompts(self, seed: int) -> Prompts:
        """Random token ids. Prefill gets others with each `seed`, so that no prompt was seen before."""
        rng = random.Random(f"{self.context} {0 if self.is_decode else seed}")
        return [rng.choices(TOKEN_IDS, k=self.context) for _ in range(max(1, self.batch))]

    def line(self, seed: int) -> str:
        """The job as a program reads it."""
        return json.dumps({**asdict(self), "prompts": self.prompts(seed)}) + "\n"


class Party(Protocol):
    """An engine under measurement."""

    def compute_prompts(self, job: Job, prompts: Prompts) -> None:
        """What comes before decode, until another job is asked for. It doesn't count."""

    def decode_s(self, job: Job, prompts: Prompts) -> float:
        """Seconds of `job.num_steps` decode steps after these prompts."""

    def prefill_s(self, job: Job, prompts: Prompts) -> float:
        """Seconds for a prompt that was never seen before, to its first token."""


def serve(open_party: Callable[[str, int], Party]) -> None:
    """`program MODEL_FOLDER THREADS`: answers jobs until stdin ends. Only answers go to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    party = open_party(sys.argv[1], int(sys.argv[2]))
    print(json.dumps("ready"), file=answers)
    computed: Job | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = asked.pop("prompts")
        job = Job(**asked)
        if job.is_decode and job != computed:
            party.compute_prompts(job, prompts)
        computed = job
        seconds = party.decode_s(job, prompts) if job.is_decode else party.prefill_s(job, prompts)
        print(json.dumps(seconds), file=answers)
