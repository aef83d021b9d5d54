"""The paced engine: its tokens, its times, and that it sees KV that is not what it should be."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
import torch

from flowkv_common.wire.nodes import StepFit
from flowkv_engine.engine.batch import Sequence, WorkItem, pack
from tests.drive import BLOCK_SIZE, GREEDY, make_sequence
from tests.paced import engine as engine_module
from tests.paced.digest import paced_tokens
from tests.paced.engine import SLACK_S, Pace, PacedEngine, step_seconds

NUM_BLOCKS = 32
WORDS = range(100, 350)
EOS = 2
PROMPT = random.Random(1).choices(range(512), k=37)


def constant(step_s: float) -> StepFit:
    """Every step takes as long."""
    return StepFit(
        base_s=step_s, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0
    )


def engine_of(fit: StepFit | None = None, eos_after: int | None = None) -> PacedEngine:
    pace = Pace(fit=fit or constant(0.0), words=WORDS, vocab_size=512, eos_token_id=EOS, eos_after=eos_after)
    return PacedEngine(torch.zeros(NUM_BLOCKS, 1, 2, BLOCK_SIZE, 1, 8), pace)


def sequence_of(prompt_ids: list[int]) -> Sequence:
    return make_sequence(prompt_ids, random.Random(0).sample(range(NUM_BLOCKS), 8), GREEDY)


async def generate(engine: PacedEngine, sequence: Sequence, num_tokens: int, chunk: int = 512) -> list[int]:
    while len(sequence.output_ids) < num_tokens:
        item = WorkItem(sequence, min(chunk, sequence.num_new_tokens))
        [token] = (await engine.step(pack([item], BLOCK_SIZE))).sampled
        sequence.num_computed_tokens += item.num_tokens
        if token is not None:
            sequence.output_ids.append(token.token_id)
    return sequence.output_ids


@pytest.mark.parametrize("chunk", [1, 5, 16, 512])
async def test_tokens_are_those_of_the_plain_function(chunk: int) -> None:
    async with engine_of() as engine:
        assert await generate(engine, sequence_of(PROMPT), 20, chunk) == paced_tokens(PROMPT, 20, WORDS)


def test_tokens_are_words_and_differ_with_every_token_of_the_prompt() -> None:
    outputs = {tuple(paced_tokens(PROMPT[:i] + [511] + PROMPT[i + 1 :], 8, WORDS)) for i in range(37)}
    assert len(outputs) == 37
    assert all(set(output) <= set(WORDS) for output in outputs)


async def test_a_retry_goes_on_with_the_same_tokens() -> None:
    retried = sequence_of(PROMPT)
    retried.output_ids += paced_tokens(PROMPT, 5, WORDS)
    async with engine_of() as engine:
        assert await generate(engine, retried, 20) == paced_tokens(PROMPT, 20, WORDS)


async def test_kv_that_is_lost_changes_the_tokens() -> None:
    async with engine_of() as engine:
        sequence = sequence_of(PROMPT)
        await generate(engine, sequence, 1)
        sequence.block_table[4] = sequence.block_table[0]  # where the last tokens of the prompt lie
        assert await generate(engine, sequence, 8) != paced_tokens(PROMPT, 8, WORDS)


async def test_eos_comes_only_where_it_is_asked_for() -> None:
    async with engine_of(eos_after=3) as engine:
        output = await generate(engine, sequence_of(PROMPT), 4)
    assert output == [*paced_tokens(PROMPT, 3, WORDS), EOS]
    assert EOS not in paced_tokens(PROMPT, 300, WORDS)


def test_a_step_costs_what_the_fit_says() -> None:
    """A chunk of 5 behind 8 tokens, a prompt of 3, and two that decode at contexts 11 and 21."""
    fit = StepFit(
        base_s=1.0, prefill_token_s=1e-2, attended_token_s=1e-4, sequence_s=1e-6, context_token_s=1e-8
    )
    chunk, prompt, short, long = (sequence_of([5] * n) for n in (13, 3, 11, 21))
    chunk.num_computed_tokens, short.num_computed_tokens, long.num_computed_tokens = 8, 10, 20
    batch = pack([WorkItem(short, 1), WorkItem(long, 1), WorkItem(chunk, 5), WorkItem(prompt, 3)], BLOCK_SIZE)
    num_pairs = (9 + 10 + 11 + 12 + 13) + (1 + 2 + 3)
    assert step_seconds(fit, batch) == pytest.approx(
        1.0 + 8 * 1e-2 + num_pairs * 1e-4 + 2e-6 + 32 * 1e-8, rel=1e-9
    )


class Clock:
    """In the place of `time` and of the loop's timer: every sleep ends too late by `late_s`."""

    def __init__(self, late_s: float) -> None:
        self.now = 0.0
        self._late_s = late_s

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + self._late_s


@pytest.mark.parametrize(
    ("late_s", "a_step_s"), [(0.8 * SLACK_S, 0.01), (1.2 * SLACK_S, 0.01 + 1.2 * SLACK_S)]
)
async def test_lateness_adds_up_only_where_it_is_more_than_slack(
    late_s: float, a_step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_s, num_steps, clock = 0.01, 50, Clock(late_s)
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", clock.sleep)
    async with engine_of(constant(step_s)) as engine:
        sequence = sequence_of(PROMPT[:5])
        await generate(engine, sequence, 1)
        began = clock.now
        await generate(engine, sequence, 1 + num_steps)
    assert clock.now - began == pytest.approx(num_steps * a_step_s)
    assert engine.kept.num_steps == num_steps + 1
    assert engine.kept.stated_s == pytest.approx((num_steps + 1) * step_s)
    assert engine.kept.taken_s == pytest.approx(step_s + late_s + num_steps * a_step_s)


async def test_a_pause_is_not_made_good() -> None:
    """Only lateness is: a step that is asked for late still takes its time."""
    step_s = 0.02
    async with engine_of(constant(step_s)) as engine:
        sequence = sequence_of(PROMPT[:5])
        await generate(engine, sequence, 1)
        await asyncio.sleep(2 * step_s)
        began = time.monotonic()
        await generate(engine, sequence, 2)
    assert time.monotonic() - began >= step_s


async def test_slowdown_stretches_later_steps() -> None:
    async with engine_of(constant(0.002)) as engine:
        sequence = sequence_of(PROMPT[:5])
        await generate(engine, sequence, 1)
        engine.slowdown = 10.0
        began = time.monotonic()
        await generate(engine, sequence, 2)
    assert time.monotonic() - began >= 0.02 - SLACK_S  # of which it makes good what the step before was late
