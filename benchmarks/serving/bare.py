"""The engine without services, in the shapes of a load: what HTTP throughput and TTFT are held against."""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.jobs import Job
from benchmarks.engine.process import party
from benchmarks.serving.loop import Load
from benchmarks.serving.short import NUM_TOKENS

_REPEATS = 3


@dataclass(frozen=True)
class Bare:
    """`output_tokens_per_s` of one wave: all prompts one after the other, then all decode together."""

    load: str
    output_tokens_per_s: float
    decode_step_ms: float


@dataclass(frozen=True)
class Floors:
    """Of the bare engine, medians; `short_prefill_ms`: a prompt of 10 tokens to its first token."""

    short_prefill_ms: float
    loads: list[Bare]


def bare(model: str, loads: list[Load], num_threads: int, cores: list[int], is_wanted: bool) -> Floors | None:
    """Run after the servers have ended. Raises PartyFailed."""
    if not is_wanted:
        return None
    with (
        tempfile.NamedTemporaryFile() as log,
        party("flowkv", Path(sys.executable), model, num_threads, cores, Path(log.name), []) as engine,
    ):
        engine.wait_ready()

        def median_s(job: Job) -> float:
            engine.seconds(job)
            return statistics.median(engine.seconds(job) for _ in range(_REPEATS))

        found = []
        for load in loads:
            num_steps = load.num_output_tokens - 1
            decode_s = median_s(Job(load.concurrency, load.num_prompt_tokens, num_steps))
            wave_s = load.concurrency * median_s(Job(0, load.num_prompt_tokens)) + decode_s
            num_tokens = load.concurrency * load.num_output_tokens
            found.append(
                Bare(load.title, round(num_tokens / wave_s, 2), round(1e3 * decode_s / num_steps, 2))
            )
        return Floors(round(1e3 * median_s(Job(0, NUM_TOKENS)), 2), found)
