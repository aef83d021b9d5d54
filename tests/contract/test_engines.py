"""What FlowKV promises of an engine: both the product's, on its thread, and the paced one of the tests."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from flowkv_common.wire.nodes import StepFit
from flowkv_engine.engine.batch import PackedBatch, Sequence, WorkItem, pack, tokens_that_count
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import Engine, EngineThread, Runner
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.paced.engine import Pace, PacedEngine
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

NUM_BLOCKS = 64
NUM_OUTPUTS = 6
PROMPT = [(7 * i) % 300 + 20 for i in range(29)]
OTHER = [(5 * i) % 300 + 20 for i in range(11)]
FIT = StepFit(base_s=0.002, prefill_token_s=1e-5, attended_token_s=0.0, sequence_s=1e-4, context_token_s=0.0)

MakeEngine = Callable[[], Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("models") / "llama", seed=1)
    return load_tiny(folder)


@pytest.fixture(params=["thread", "paced"])
def make_engine(request: pytest.FixtureRequest, model: LoadedModel) -> MakeEngine:
    """Gives engines with a pool of their own each."""

    def thread() -> Engine:
        return EngineThread(Runner(model, make_pool(model, NUM_BLOCKS)))

    def paced() -> Engine:
        pace = Pace(fit=FIT, words=range(20, 500), vocab_size=VOCAB_SIZE, eos_token_id=2)
        return PacedEngine(torch.zeros(NUM_BLOCKS, 1, 2, BLOCK_SIZE, 1, 8), pace)

    return {"thread": thread, "paced": paced}[request.param]


@pytest.fixture
async def engine(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    async with asyncio.timeout(20), make_engine() as opened:
        yield opened


def sequence_of(prompt_ids: list[int], first_block: int = 0) -> Sequence:
    """With blocks for all of its output, in reverse."""
    num_blocks = -(-(len(prompt_ids) + NUM_OUTPUTS) // BLOCK_SIZE)
    return make_sequence(prompt_ids, list(reversed(range(first_block, first_block + num_blocks))))


def batch_of(*items: tuple[Sequence, int]) -> PackedBatch:
    return pack([WorkItem(*item) for item in items], BLOCK_SIZE)


def whole(*sequences: Sequence) -> PackedBatch:
    """All that is new of each."""
    return batch_of(*((sequence, sequence.num_new_tokens) for sequence in sequences))


async def advance(engine: Engine, *items: tuple[Sequence, int]) -> None:
    """One step, booked as the node does it."""
    result = await engine.step(batch_of(*items))
    for (sequence, num_tokens), token in zip(items, result.sampled, strict=True):
        sequence.num_computed_tokens += num_tokens
        if token is not None:
            sequence.output_ids.append(token.token_id)


async def generate(engine: Engine, sequence: Sequence) -> list[int]:
    while len(sequence.output_ids) < NUM_OUTPUTS:
        await advance(engine, (sequence, sequence.num_new_tokens))
    return sequence.output_ids


async def test_an_item_that_does_not_reach_its_last_token_gives_none(engine: Engine) -> None:
    first, second = sequence_of(PROMPT), sequence_of(OTHER, first_block=10)
    result = await engine.step(batch_of((first, 8), (second, second.num_new_tokens)))
    assert [token is None for token in result.sampled] == [True, False]


async def test_tokens_depend_on_the_prompt_alone(engine: Engine) -> None:
    """Not on chunks, company, blocks or which engine."""
    alone = await generate(engine, sequence_of(PROMPT))
    assert len(set(alone)) > 1
    chunked, company = sequence_of(PROMPT, first_block=20), sequence_of(OTHER, first_block=40)
    await advance(engine, (chunked, 7), (company, company.num_new_tokens))
    await advance(engine, (chunked, 9), (company, 1))
    while len(chunked.output_ids) < NUM_OUTPUTS:
        await advance(engine, (chunked, chunked.num_new_tokens))
    assert chunked.output_ids == alone


@pytest.mark.parametrize("num_right", [0, 2, 4])
async def test_guesses_change_no_token(engine: Engine, num_right: int) -> None:
    """What stands in the blocks after a wrong one is written again."""
    expected = (await generate(engine, sequence_of(PROMPT))).copy()
    sequence = sequence_of(PROMPT, first_block=20)
    await advance(engine, (sequence, len(PROMPT)))
    while (done := len(sequence.output_ids)) < NUM_OUTPUTS:
        draft = expected[done : done + num_right] + [1, 2] * (num_right < 4)
        item = WorkItem(sequence, 1, tuple(draft[: NUM_OUTPUTS - 1 - done]))
        result = await engine.step(pack([item], BLOCK_SIZE))
        [tokens] = tokens_that_count([item], result.sampled)
        assert len(tokens) > min(num_right, len(item.draft))
        sequence.num_computed_tokens += len(tokens)
        sequence.output_ids += [token.token_id for token in tokens if token]
    assert sequence.output_ids == expected


async def test_another_engine_gives_the_same_tokens(make_engine: MakeEngine) -> None:
    async with asyncio.timeout(20), make_engine() as one, make_engine() as other:
        assert await generate(one, sequence_of(PROMPT)) == await generate(other, sequence_of(PROMPT))


async def test_steps_run_in_the_order_asked_for(engine: Engine) -> None:
    """Each needs the KV of the one before, and they are all asked for at once."""
    sequence = sequence_of(PROMPT)
    steps = []
    for num_tokens in (8, 8, 13):
        steps.append(asyncio.create_task(engine.step(batch_of((sequence, num_tokens)))))
        await asyncio.sleep(0)  # so that it has asked
        sequence.num_computed_tokens += num_tokens
    ended: list[object] = []
    for step in steps:
        step.add_done_callback(ended.append)
    *_, result = await asyncio.gather(*steps)
    [last] = result.sampled
    assert ended == steps
    assert last is not None
    expected = await generate(engine, sequence_of(PROMPT, first_block=20))
    assert last.token_id == expected[0]


@pytest.mark.parametrize("waits", [False, True], ids=["running", "waiting"])
async def test_a_cancelled_step_goes_on_and_its_result_is_dropped(engine: Engine, waits: bool) -> None:
    expected = await generate(engine, sequence_of(PROMPT, first_block=20))
    sequence = sequence_of(PROMPT)
    if waits:
        engine.wedge(for_s=0.05)
    step = asyncio.create_task(engine.step(whole(sequence)))
    await asyncio.sleep(0)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    sequence.num_computed_tokens = len(PROMPT)  # its KV is there when a later step runs
    sequence.output_ids.append(expected[0])
    assert await generate(engine, sequence) == expected


async def test_a_failed_step_raises_and_the_next_one_works(engine: Engine) -> None:
    sequence = sequence_of(PROMPT)
    broken = dataclasses.replace(whole(sequence), token_ids=whole(sequence).token_ids + VOCAB_SIZE)
    failing = asyncio.create_task(engine.step(broken))
    await asyncio.sleep(0)
    following = asyncio.create_task(engine.step(whole(sequence)))
    with pytest.raises(IndexError):
        await failing
    assert (await following).sampled != [None]


async def test_busy_since_is_set_while_there_is_work_and_at_no_other_time(engine: Engine) -> None:
    assert engine.busy_since is None
    before = time.monotonic()
    engine.wedge(for_s=0.05)
    step = asyncio.create_task(engine.step(whole(sequence_of(PROMPT))))
    seen: set[float] = set()
    while not step.done() or engine.busy_since is not None:  # the result comes before the engine is idle
        if engine.busy_since is not None:
            seen.add(engine.busy_since)
        await asyncio.sleep(0)
    assert seen
    assert before <= min(seen) <= max(seen) <= time.monotonic()


async def test_a_wedge_holds_up_all_later_steps(engine: Engine) -> None:
    began = time.monotonic()
    engine.wedge(for_s=0.1)
    await engine.step(whole(sequence_of(PROMPT)))
    assert time.monotonic() - began >= 0.1


async def test_a_wedged_engine_does_not_hold_up_the_end(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowkv_engine.engine.runner.CLOSE_TIMEOUT_S", 0.02)
    monkeypatch.setattr("tests.paced.engine.CLOSE_TIMEOUT_S", 0.02)
    async with asyncio.timeout(20), make_engine() as engine:
        engine.wedge(for_s=60.0)
        began = time.monotonic()
    assert time.monotonic() - began < 30.0
