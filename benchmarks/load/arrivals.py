"""When requests come and how long they are. Pure but for the file that a trace is read from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Lengths(NamedTuple):
    """What a kind of request asks for. `spread` is the share by which both may be longer or shorter."""

    num_prompt_tokens: int
    num_output_tokens: int
    spread: float = 0.0

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Prompt and output tokens of one request, at least 1 each."""
        factors = (rng.uniform(1 - self.spread, 1 + self.spread) for _ in range(2))
        prompt, output = (max(1, round(n * f)) for n, f in zip(self[:2], factors, strict=True))
        return prompt, output


class Arrival(NamedTuple):
    """One request, `at_s` seconds after the beginning. `kind` is what the tables call it."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    kind: str = ""


class Phase(NamedTuple):
    """So many requests per second, on average, for so long."""

    kind: str
    rate_per_s: float
    duration_s: float
    lengths: Lengths


def poisson(phases: list[Phase], rng: random.Random) -> Iterator[Arrival]:
    """Each phase after the other: the gaps between arrivals are exponential, so they come in bursts."""
    begins_s = 0.0
    for phase in phases:
        at_s = rng.expovariate(phase.rate_per_s)
        while at_s < phase.duration_s:
            yield Arrival(begins_s + at_s, *phase.lengths.draw(rng), phase.kind)
            at_s += rng.expovariate(phase.rate_per_s)
        begins_s += phase.duration_s


def from_trace(path: Path, rate_factor: float = 1.0) -> list[Arrival]:
    """Mooncake's JSON lines: milliseconds and lengths; `rate_factor` 2 sends the same twice as fast.

    Raises OSError, KeyError or ValueError where it is none.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Arrival(
            at_s=record["timestamp"] / 1e3 / rate_factor,
            num_prompt_tokens=record["input_length"],
            num_output_tokens=max(1, record["output_length"]),
            kind="trace",
        )
        for record in records
    ]
