from __future__ import annotations

import asyncio
import fcntl
import functools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.batch import PackedBatch, Sequence, WorkItem, pack
from flowkv_engine.engine.cpu.forward import CpuFlatForward
from flowkv_engine.engine.forward import ModulesForward
from flowkv_engine.engine.model import LoadedModel
from flowkv_engine.engine.runner import EngineThread, Runner, compiling_alone, source_stamp
from tests.drive import BLOCK_SIZE, GREEDY, generate, load_tiny, make_pool, make_sequence, step
from tests.oracle import check_identity
from tests.tiny_models import ARCHITECTURES, FLAT, VOCAB_SIZE, make_tiny_model

NUM_BLOCKS = 64
NUM_OUTPUTS = 16
PROMPT_LENS = (5, 33, 17, 1)


OFTEN = {"gemma3_text"}  # of the further architectures


@pytest.fixture(
    scope="module",
    params=[
        *(each for each in ARCHITECTURES if each != "mistral"),  # without a window it is a Llama
        *(pytest.param(arch, marks=[pytest.mark.full] * (arch not in OFTEN)) for arch in FLAT),
        "gpt2",
    ],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = request.param
    return make_tiny_model(tmp_path_factory.mktemp("models") / arch, arch, seed=1, **FLAT.get(arch, {}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", seed=1)


def sequences(sampling: SamplingParams = GREEDY, lens: tuple[int, ...] = PROMPT_LENS) -> list[Sequence]:
    """The same prompts every time, on shuffled blocks."""
    rng = random.Random(0)
    blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    made = []
    for length in lens:
        prompt_ids = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        num_blocks = -(-(length + NUM_OUTPUTS) // BLOCK_SIZE)
        made.append(make_sequence(prompt_ids, [blocks.pop() for _ in range(num_blocks)], sampling))
    return made


@functools.cache
def reference_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def reference(folder: Path, prompt_ids: list[int]) -> list[int]:
    """What `transformers` generates for the prompt, alone."""
    tokens = torch.tensor([prompt_ids])
    out = reference_model(folder).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NUM_OUTPUTS
    )
    output_ids: list[int] = out[0, len(prompt_ids) :].tolist()
    return output_ids


@pytest.mark.parametrize("attention", ["torch", "cpu"])
def test_greedy_tokens_are_those_of_transformers(folder: Path, attention: str) -> None:
    """Chunks of 11 tokens beside decode, shuffled blocks of 8, four sequences at once."""
    model = load_tiny(folder)
    runner = Runner(model, make_pool(model, NUM_BLOCKS), attention=attention)
    batch = sequences()
    generate(runner, batch, NUM_OUTPUTS, chunk_tokens=11)
    for sequence in batch:
        assert sequence.output_ids == reference(folder, sequence.prompt_ids)
        check_identity(folder, sequence.prompt_ids, sequence.output_ids)


def test_oracle_sees_a_wrong_token(llama: Path) -> None:
    prompt_ids = [3, 4, 5]
    output_ids = reference(llama, prompt_ids)
    output_ids[4] ^= 1
    with pytest.raises(AssertionError, match="output 4 of 16"):
        check_identity(llama, prompt_ids, output_ids)


def test_drawn_tokens_are_the_same_alone_in_company_and_after_a_retry(llama: Path) -> None:
    model = load_tiny(llama)
    runner = Runner(model, make_pool(model, NUM_BLOCKS))
    sampling = SamplingParams(max_tokens=64, seed=11, temperature=1.2, top_p=0.9, repetition_penalty=1.1)
    company = sequences(sampling)
    generate(runner, company, NUM_OUTPUTS)
    alone = sequences(sampling)[1]
    generate(runner, [alone], NUM_OUTPUTS, chunk_tokens=7)
    assert alone.output_ids == company[1].output_ids

    retried = sequences(sampling)[1]
    retried.output_ids += alone.output_ids[:6]  # the second attempt starts with what the first has shown
    generate(runner, [retried], NUM_OUTPUTS)
    assert retried.output_ids == alone.output_ids


def test_bfloat16_kv_runs(llama: Path) -> None:
    model = load_tiny(llama)
    first, second = sequences(), sequences()
    generate(Runner(model, make_pool(model, NUM_BLOCKS, torch.bfloat16), attention="torch"), first, 4)
    generate(Runner(model, make_pool(model, NUM_BLOCKS, torch.bfloat16), attention="cpu"), second, 4)
    assert [sequence.output_ids for sequence in first] == [sequence.output_ids for sequence in second]


def test_chooses_the_fastest_that_works(folder: Path) -> None:
    model = load_tiny(folder)
    runner = Runner(model, make_pool(model, 2), attention="auto")
    assert runner.attention.name == "cpu"
    assert isinstance(runner.forward, ModulesForward if folder.name == "gpt2" else CpuFlatForward)


def test_refuses_the_pool_of_another_model(llama: Path) -> None:
    with pytest.raises(ValueError, match="is not for llama"):
        Runner(load_tiny(llama), torch.zeros(4, 3, 2, BLOCK_SIZE, 2, 8).unbind(1))


def test_logits_that_are_not_finite_raise(llama: Path) -> None:
    model = load_tiny(llama)
    runner = Runner(model, make_pool(model, NUM_BLOCKS))
    sequence = sequences()[1]
    sequence.num_computed_tokens = 8  # a lie: nothing has been written there
    with pytest.raises(FloatingPointError):
        step(runner, [WorkItem(sequence, sequence.num_new_tokens)])


# --- the engine's thread ----------------------------------------------------------------------------


class HeldRunner(Runner):
    """A runner whose steps wait until they are let go."""

    def __init__(self, model: LoadedModel) -> None:
        self.started = threading.Event()
        self.go = threading.Event()
        self.go.set()
        super().__init__(model, make_pool(model, NUM_BLOCKS))
        self.go.clear()
        self.started.clear()

    def run(self, batch: PackedBatch) -> Any:
        self.started.set()
        assert self.go.wait(5)
        return super().run(batch)


def batch_of(sequence: Sequence) -> PackedBatch:
    return pack([WorkItem(sequence, sequence.num_new_tokens)], BLOCK_SIZE)


async def test_steps_run_off_the_loop(llama: Path) -> None:
    runner = HeldRunner(load_tiny(llama))
    sequence = sequences()[0]
    async with asyncio.timeout(10), EngineThread(runner) as engine:
        assert engine.busy_since is None
        stepping = asyncio.create_task(engine.step(batch_of(sequence)))
        await asyncio.to_thread(runner.started.wait, 5)
        assert engine.busy_since is not None
        assert engine.busy_since <= time.monotonic()
        runner.go.set()
        [sampled] = (await stepping).sampled
    assert engine.busy_since is None
    assert sampled is not None
    assert sampled.token_id == reference(llama, sequence.prompt_ids)[0]


async def test_a_cancelled_step_goes_on_and_the_next_ones_are_right(llama: Path) -> None:
    runner = HeldRunner(load_tiny(llama))
    sequence = sequences()[1]
    async with asyncio.timeout(10), EngineThread(runner) as engine:
        stepping = asyncio.create_task(engine.step(batch_of(sequence)))
        await asyncio.to_thread(runner.started.wait, 5)
        stepping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stepping
        runner.go.set()
        while len(sequence.output_ids) < NUM_OUTPUTS:
            [sampled] = (await engine.step(batch_of(sequence))).sampled
            assert sampled is not None
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.output_ids.append(sampled.token_id)
    assert sequence.output_ids == reference(llama, sequence.prompt_ids)


async def test_a_failed_step_raises_and_the_thread_goes_on(llama: Path) -> None:
    model = load_tiny(llama)
    runner = Runner(model, make_pool(model, NUM_BLOCKS))
    broken, sound = sequences()[1], sequences()[0]
    broken.num_computed_tokens = 8
    async with asyncio.timeout(10), EngineThread(runner) as engine:
        with pytest.raises(FloatingPointError):
            await engine.step(batch_of(broken))
        assert (await engine.step(batch_of(sound))).sampled != [None]


async def test_a_wedged_thread_shows_and_does_not_hold_up_the_end(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowkv_engine.engine.runner.CLOSE_TIMEOUT_S", 0.05)
    model = load_tiny(llama)
    before = set(threading.enumerate())
    async with asyncio.timeout(10), EngineThread(Runner(model, make_pool(model, 1))) as engine:
        [thread] = set(threading.enumerate()) - before
        engine.wedge(for_s=2.0)
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    assert engine.busy_since is not None
    assert thread.daemon
    thread.join(20)
    assert engine.busy_since is None


def test_one_process_compiles_and_the_others_wait_until_it_has(tmp_path: Path) -> None:
    def compile_kernels() -> None:
        with compiling_alone(tmp_path, "model-float32"):
            compiled.append(len(compiled))

    compiled: list[int] = []
    with ThreadPoolExecutor() as others:
        with compiling_alone(tmp_path, "model-float32"):
            waiting = others.submit(compile_kernels)
            time.sleep(0.3)
            assert compiled == []
        waiting.result(5)
    assert compiled == [0]


def test_kernels_of_another_folder_or_time_are_others(tmp_path: Path) -> None:
    """Else several processes compile them at once, since some other installation has kept its own."""
    stamps = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "kernels.py").write_text("pass")
        stamps |= {source_stamp(folder), source_stamp(folder)}
    os.utime(tmp_path / "b" / "kernels.py", (1, 1))
    assert len(stamps | {source_stamp(tmp_path / "b")}) == 3


def test_what_failed_to_compile_is_compiled_again_and_what_did_not_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="amid"), compiling_alone(tmp_path, "m"):
        raise ValueError("amid")
    assert not (tmp_path / "m.kept").exists()
    with compiling_alone(tmp_path, "m"):
        pass
    with (tmp_path / "m.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with compiling_alone(tmp_path, "m"):
            pass
