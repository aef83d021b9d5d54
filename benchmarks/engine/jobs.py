"""What an engine is asked to do, and how it answers. Needs the standard library only."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.model import TOKEN_IDS


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

    def prompts(self, seed: int = 0) -> list[list[int]]:
        """Random token ids; another `seed`, other prompts."""
        rng = random.Random(f"{self.context} {seed}")
        return [rng.choices(TOKEN_IDS, k=self.context) for _ in range(max(1, self.batch))]


class Party:
    """An engine under measurement."""

    def decode_s(self, job: Job) -> float:
        """Seconds that `job.num_steps` decode steps took. What comes before them doesn't count."""
        raise NotImplementedError

    def prefill_s(self, job: Job, seed: int) -> float:
        """Seconds for a prompt that was never seen before, to its first token."""
        raise NotImplementedError


def serve(open_party: Callable[[str, int], Party]) -> None:
    """`program MODEL_FOLDER THREADS`: answers jobs until stdin ends. Only answers go to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    party = open_party(sys.argv[1], int(sys.argv[2]))
    print(json.dumps("ready"), file=answers)
    for number, line in enumerate(sys.stdin):
        job = Job(**json.loads(line))
        seconds = party.decode_s(job) if job.is_decode else party.prefill_s(job, seed=number)
        print(json.dumps(seconds), file=answers)


def line_of(job: Job) -> str:
    return json.dumps(asdict(job)) + "\n"
