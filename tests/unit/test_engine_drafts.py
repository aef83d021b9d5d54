"""Steps that compute guesses: the tokens, bit by bit, are those of steps of one token each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_common.wire.messages import Grammar, SamplingParams
from flowkv_engine.engine.batch import Sequence, WorkItem, pack, tokens_that_count
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.sampler import Sampled
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.gateway_support import EOS, START, write_tokenizer
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

NUM_BLOCKS = 32
NUM_OUTPUTS = 16
PROMPT = [5, 6, 7, 8, 5, 6, 7]
REGEX = Grammar(kind="regex", text="(ab|ac|[x-z]{2,3} )+")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model(folder, seed=1, eos_token_id=EOS, bos_token_id=START)
    model, num_threads = load_tiny(write_tokenizer(folder)), torch.get_num_threads()
    torch.set_num_threads(1)  # many steps of next to no work: threads would only wait for each other
    yield Runner(model, make_pool(model, NUM_BLOCKS), attention="cpu")
    torch.set_num_threads(num_threads)


def test_a_guess_is_an_item_of_one_token_on_the_blocks_of_its_sequence() -> None:
    sequence = make_sequence([10, 11, 12], [7, 2], SamplingParams(max_tokens=9, frequency_penalty=1.0))
    sequence.num_computed_tokens = 3
    sequence.output_ids.append(13)
    prompt = make_sequence([20, 21], [5])
    batch = pack([WorkItem(sequence, 1, (14, 15)), WorkItem(prompt, 2)], block_size=4)
    assert batch.token_ids.tolist() == [13, 14, 15, 20, 21]
    assert batch.position_ids.tolist() == [3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [31, 8, 9, 20, 21]
    assert batch.query_lens.tolist() == [1, 1, 1, 2]
    assert batch.context_lens.tolist() == [4, 5, 6, 2]
    assert batch.block_tables.tolist() == [[7, 0], [7, 2], [7, 2], [5, 0]]
    assert batch.logits_indices.tolist() == [0, 1, 2, 4]
    inputs = [sample for sample in batch.samples if sample]
    assert [one.output_index for one in inputs] == [1, 2, 3, 0]
    assert [one.output_ids for one in inputs] == [[13], [13, 14], [13, 14, 15], []]
    assert [one.is_drafted for one in inputs] == [False, True, True, False]


def test_a_draft_without_blocks_or_behind_other_tokens_is_refused() -> None:
    sequence = make_sequence([1, 2, 3], [0])
    with pytest.raises(ValueError, match="1 blocks for 5 tokens"):
        pack([WorkItem(sequence, 3, (4, 5))], block_size=4)
    with pytest.raises(ValueError, match="2 tokens before it"):
        pack([WorkItem(sequence, 1, (4,))], block_size=4)


@pytest.mark.parametrize(
    ("draft", "drawn", "counted"),
    [((), [4], [4]), ((4, 5), [4, 5, 6], [4, 5, 6]), ((4, 5), [4, 7, 6], [4, 7]), ((4, 5), [3, 5, 6], [3])],
)
def test_tokens_count_to_the_first_that_was_not_guessed(
    draft: tuple[int, ...], drawn: list[int], counted: list[int]
) -> None:
    items = [WorkItem(make_sequence([1]), 1), WorkItem(make_sequence([1]), 1, draft)]
    chunk, tokens = tokens_that_count(items, [None, *(Sampled(token, None) for token in drawn)])
    assert (chunk, [one.token_id for one in tokens if one]) == ([None], counted)


def sequences(sampling: list[SamplingParams]) -> list[Sequence]:
    per_sequence = NUM_BLOCKS // len(sampling)
    return [
        make_sequence(PROMPT * (1 + row), list(range(row * per_sequence, (row + 1) * per_sequence)), each)
        for row, each in enumerate(sampling)
    ]


def run(runner: Runner, these: list[Sequence], guesses: Guesses | None = None) -> list[list[Sampled]]:
    """All tokens of each, in steps with `guesses` where there are some."""
    made: list[list[Sampled]] = [[] for _ in these]
    running = list(range(len(these)))
    while running:
        items = [
            WorkItem(these[row], these[row].num_new_tokens, guesses.of(row, these[row]) if guesses else ())
            for row in running
        ]
        result = runner.run(pack(items, BLOCK_SIZE))
        for row, item, tokens in zip(
            running.copy(), items, tokens_that_count(items, result.sampled), strict=True
        ):
            item.sequence.num_computed_tokens += item.num_tokens + len(tokens) - 1
            for one in tokens:
                assert one is not None
                assert one.error is None
                made[row].append(one)
                item.sequence.output_ids.append(one.token_id)
                if one.ends_grammar or one.token_id == EOS or len(made[row]) == NUM_OUTPUTS:
                    running.remove(row)
                    break
    return made


class Guesses:
    """Of the tokens that will come, some wrong."""

    def __init__(self, right: list[list[Sampled]], seed: int, share_wrong: float) -> None:
        self._right = [[one.token_id for one in each] for each in right]
        self._rng = np.random.default_rng(seed)
        self._share_wrong = share_wrong
        self.num_right = 0

    def of(self, row: int, sequence: Sequence) -> tuple[int, ...]:
        num_outputs = len(sequence.output_ids)
        num_slots = len(sequence.block_table) * BLOCK_SIZE - sequence.num_tokens
        length = int(self._rng.integers(0, min(7, num_slots) + 1))
        # Beyond the end, too: a sequence may end within its draft.
        right = [*self._right[row][num_outputs : num_outputs + length], *[9] * length][:length]
        wrong = self._rng.random(length) < self._share_wrong
        guess = np.where(wrong, self._rng.integers(0, VOCAB_SIZE, length), right)
        return tuple(guess.tolist())


def check(runner: Runner, sampling: list[SamplingParams], seed: int, share_wrong: float) -> None:
    expected = run(runner, sequences(sampling))
    these = sequences(sampling)
    assert run(runner, these, Guesses(expected, seed, share_wrong)) == expected  # log probabilities, too


def asked(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 99, "temperature": 1.0, "seed": 3, **fields})


KINDS = [
    asked(temperature=0.0, num_logprobs=2),
    asked(temperature=1.3, top_p=0.9, num_logprobs=0),
    asked(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5),
    asked(grammar=REGEX, temperature=1.5, min_tokens=6),
    asked(grammar=REGEX, top_k=20, num_logprobs=1, bad_words=[[70, 71]]),
]


def test_guesses_change_no_token(runner: Runner) -> None:
    check(runner, KINDS, 0, 0.3)


parameters = st.builds(
    asked,
    seed=st.integers(0, 2**63),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {EOS: 3.0, 40: 4.0}]),
    min_tokens=st.sampled_from([0, 9]),
    num_logprobs=st.sampled_from([None, 0, 3]),
    bad_words=st.sampled_from([[], [[40, 41], [42]]]),
    grammar=st.sampled_from([None, REGEX]),
)


@pytest.mark.full
@settings(max_examples=100)
@given(st.lists(parameters, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_guesses_change_no_token_whatever_is_asked(
    runner: Runner, sampling: list[SamplingParams], seed: int, share_wrong: float
) -> None:
    check(runner, sampling, seed, share_wrong)
