"""Log probabilities of prompts, against plain `transformers`: in chunks, in company, on every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowkv_common.wire.messages import SamplingParams, TokenLogprob
from flowkv_engine.engine import runner as runner_module
from flowkv_engine.engine import sampler
from flowkv_engine.engine.batch import Sequence, WorkItem, pack
from flowkv_engine.engine.runner import Runner
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

PROMPT = [(7 * i) % 300 + 20 for i in range(29)]
OTHER = [(5 * i) % 300 + 20 for i in range(11)]
NUM_TOP = 3


def asking(prompt_ids: list[int], first_block: int, num_top: int | None = NUM_TOP) -> Sequence:
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={9: 5.0}, num_prompt_logprobs=num_top)
    blocks = list(reversed(range(first_block, first_block + 6)))
    return make_sequence(prompt_ids, blocks, sampling)


def step(runner: Runner, *items: tuple[Sequence, int]) -> list[list[TokenLogprob]]:
    """What each item got, booked as the node does it."""
    result = runner.run(pack([WorkItem(*item) for item in items], BLOCK_SIZE))
    for place, (sequence, num_tokens) in enumerate(items):
        sequence.num_computed_tokens += num_tokens
        sequence.num_scored_tokens += len(result.prompt_logprobs.get(place, ()))
        if (sampled := result.sampled[place]) is not None:
            sequence.output_ids.append(sampled.token_id)
    return [result.prompt_logprobs.get(place, []) for place in range(len(items))]


def expected(folder: Path, prompt_ids: list[int]) -> torch.Tensor:
    """[tokens - 1, vocab]"""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt_ids])).logits[0, :-1]
        return logits.log_softmax(-1)


def check(folder: Path, prompt_ids: list[int], got: list[TokenLogprob], num_top: int = NUM_TOP) -> None:
    assert [one.token_id for one in got] == prompt_ids[1:]
    for one, row in zip(got, expected(folder, prompt_ids), strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
        assert one.rank == 1 + int((row > row[one.token_id]).sum())
        best = row.topk(num_top)
        assert [token_id for token_id, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.fixture(
    scope="module", params=[("llama", "torch"), ("llama", "cpu"), ("gpt2", "torch")], ids="-".join
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runner]:
    """A model, and a runner that looks at the logits of five rows of a prompt at a time."""
    arch, attention = request.param
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / arch, arch, seed=1)
    model = load_tiny(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner_module, "MAX_PROMPT_LOGITS", 5 * VOCAB_SIZE)
        return folder, Runner(model, make_pool(model, 32), attention=attention)


@pytest.fixture
def folder(made: tuple[Path, Runner]) -> Path:
    return made[0]


@pytest.fixture
def runner(made: tuple[Path, Runner]) -> Runner:
    return made[1]


def test_they_are_those_of_transformers_in_chunks_and_company(folder: Path, runner: Runner) -> None:
    chunked, whole, silent = asking(PROMPT, 0), asking(OTHER, 6, num_top=0), asking(OTHER, 12, None)
    first = step(runner, (silent, 11), (chunked, 8), (whole, 11))
    second = step(runner, (silent, 1), (whole, 1), (chunked, 13))
    third = step(runner, (chunked, 8), (silent, 1))
    assert first[0] == second[0] == second[1] == third[1] == []
    check(folder, PROMPT, first[1] + second[2] + third[0])
    check(folder, OTHER, first[2], num_top=0)
    # The last of them costs the sampled token nothing.
    assert whole.output_ids[:2] == silent.output_ids[:2]


def test_a_prompt_is_scored_once(runner: Runner) -> None:
    """Neither output, nor what is computed again after a preemption."""
    sequence = asking(PROMPT, 0)
    sequence.output_ids = [5, 6]
    assert len(step(runner, (sequence, 20))[0]) == 20
    sequence.num_computed_tokens = 16
    assert [one.token_id for one in step(runner, (sequence, 15))[0]] == PROMPT[21:]
    sequence.num_computed_tokens = 0
    assert not sequence.lacks_prompt_logprobs
    assert step(runner, (sequence, sequence.num_new_tokens)) == [[]]


def test_a_prompt_of_one_token_has_none(runner: Runner) -> None:
    assert step(runner, (asking([5], 0), 1)) == [[]]


def test_memory_is_bounded(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the chunk is."""
    shapes = []

    def watched(logits: torch.Tensor, *rest: Any, **named: Any) -> list[TokenLogprob]:
        shapes.append(tuple(logits.shape))
        return sampler.logprobs(logits, *rest, **named)

    monkeypatch.setattr(runner_module, "logprobs", watched)
    [got] = step(runner, (asking(PROMPT, 0), len(PROMPT)))
    assert shapes == [(5, VOCAB_SIZE)] * 5 + [(3, VOCAB_SIZE)]
    assert len(got) == len(PROMPT) - 1


def test_what_is_not_asked_for_is_not_computed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(runner.forward), "in_pieces", None)
    assert step(runner, (asking(PROMPT, 0, None), len(PROMPT))) == [[]]


def test_logits_that_are_not_finite_raise(runner: Runner) -> None:
    sequence = asking(PROMPT, 20)
    sequence.num_computed_tokens = 8  # a lie: nothing has been written there
    with pytest.raises(FloatingPointError):
        step(runner, (sequence, 8))
