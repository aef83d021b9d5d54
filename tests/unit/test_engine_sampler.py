from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.sampler import PREFIX_LEN, SampleInput, _most_likely, sample

EOS = [2]


def choose(
    logits: torch.Tensor,
    index: int = 0,
    prompt_ids: list[int] | None = None,
    output_ids: list[int] | None = None,
    **sampling: Any,
) -> int:
    params = SamplingParams(max_tokens=99, **sampling)
    input = SampleInput(params, index, prompt_ids or [], output_ids or [])
    return sample(logits.unsqueeze(0), [input], EOS)[0].token_id


def frequencies(logits: torch.Tensor, num_draws: int = 400, **sampling: Any) -> dict[int, float]:
    counts = Counter(choose(logits, index, seed=7, **sampling) for index in range(num_draws))
    return {token_id: count / num_draws for token_id, count in counts.items()}


def test_greedy_is_the_maximum_whatever_the_company() -> None:
    logits = torch.randn(4, 50, generator=torch.manual_seed(0))
    greedy = SampleInput(SamplingParams(max_tokens=9, temperature=0.0), 0, [], [])
    drawn = SampleInput(SamplingParams(max_tokens=9, temperature=2.0), 0, [], [])
    tokens = [sampled.token_id for sampled in sample(logits, [greedy, drawn, greedy, greedy], EOS)]
    best = logits.argmax(-1).tolist()
    assert [tokens[0], *tokens[2:]] == [best[0], *best[2:]]
    assert tokens[1] == choose(logits[1], temperature=2.0)


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    logits = torch.zeros(1000)
    first = [choose(logits, index, seed=1) for index in range(20)]
    torch.manual_seed(99)
    assert first == [choose(logits, index, seed=1) for index in range(20)]
    assert first != [choose(logits, index, seed=2) for index in range(20)]
    assert len(set(first)) > 15
    assert choose(logits, 3, seed=-5) == choose(logits, 3, seed=-5)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    seen = frequencies(logits, num_draws=1000)
    assert seen == pytest.approx({0: 0.1, 1: 0.6, 2: 0.3}, abs=0.04)


def test_temperature_flattens() -> None:
    logits = torch.tensor([0.8, 0.2]).log()
    assert frequencies(logits, num_draws=1500, temperature=100.0)[1] == pytest.approx(0.5, abs=0.04)
    assert frequencies(logits, temperature=1e-9) == {0: 1.0}


def test_cuts_keep_what_they_should() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(frequencies(logits, top_k=2)) == {0, 1}
    assert set(frequencies(logits, top_p=0.75)) == {0, 1, 2}
    assert set(frequencies(logits, top_p=0.0)) == {0}
    assert set(frequencies(logits, min_p=0.6)) == {0, 1}
    # top_p is a part of what top_k leaves: 0.4 of 0.7 is over half of it.
    assert set(frequencies(logits, top_k=2, top_p=0.55)) == {0}


def test_top_k_over_the_vocabulary_is_no_cut() -> None:
    assert set(frequencies(torch.zeros(4), top_k=1000)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sampling", "num_kept"),
    [
        ({}, 1024),
        ({"top_p": 0.9}, 922),
        ({"min_p": 0.5}, 1024),
        ({"top_k": 300}, 300),
        ({"top_k": 300, "top_p": 0.9}, 270),
    ],
)
def test_flat_distributions_reach_beyond_the_prefix(sampling: dict[str, Any], num_kept: int) -> None:
    logits = -torch.arange(1024) * 1e-4
    highest = max(choose(logits, index, seed=3, **sampling) for index in range(60))
    assert PREFIX_LEN <= highest < num_kept


def test_the_prefix_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(500, generator=torch.manual_seed(1)) * 3
    cases: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 40},
        {"min_p": 0.05},
        {"top_k": 9, "top_p": 0.5},
    ]
    short = [[choose(logits, index, **case) for index in range(30)] for case in cases]
    monkeypatch.setattr("flowkv_engine.engine.sampler.PREFIX_LEN", 500)
    assert short == [[choose(logits, index, **case) for index in range(30)] for case in cases]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert choose(logits, prompt_ids=[0, 0], **greedy) == 1
    assert choose(logits, output_ids=[0], **greedy) == 1
    assert choose(logits[2:], output_ids=[0], **greedy) == 1


def test_frequency_and_presence_penalties_count_output_only() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0])
    assert choose(logits, output_ids=[0, 0], temperature=0.0, frequency_penalty=0.2) == 0
    assert choose(logits, output_ids=[0] * 3, temperature=0.0, frequency_penalty=0.2) == 1
    assert choose(logits, output_ids=[0], temperature=0.0, presence_penalty=0.6) == 1
    assert choose(logits, output_ids=[0, 1], temperature=0.0, presence_penalty=0.6) == 0
    assert choose(logits, prompt_ids=[0] * 9, temperature=0.0, presence_penalty=2.0) == 0


def test_logit_bias_moves_the_choice_and_ignores_unknown_tokens() -> None:
    logits = torch.tensor([1.0, 0.5])
    assert choose(logits, temperature=0.0, logit_bias={1: 10.0, 77: 100.0, -1: 100.0}) == 1


def test_min_tokens_holds_eos_back() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0])
    assert choose(logits, 1, temperature=0.0, min_tokens=2) == 1
    assert choose(logits, 2, temperature=0.0, min_tokens=2) == 2
    assert 2 not in frequencies(logits, num_draws=50, min_tokens=99)


def test_min_tokens_holds_the_requests_own_stops_back() -> None:
    logits = torch.tensor([0.0, 1.0, 5.0, 9.0])
    stops: dict[str, Any] = {"stop_token_ids": [3, 77, -1], "min_tokens": 2, "temperature": 0.0}
    assert [choose(logits, index, **stops) for index in (1, 2)] == [1, 3]


def test_only_allowed_tokens_are_chosen() -> None:
    logits = torch.tensor([9.0, 1.0, 5.0, 0.0])
    assert choose(logits, temperature=0.0, allowed_token_ids=[1, 3, 77, -1]) == 1
    assert set(frequencies(logits, num_draws=200, temperature=2.0, allowed_token_ids=[1, 3])) == {1, 3}
    assert choose(logits, temperature=0.0, allowed_token_ids=[3], logit_bias={0: 100.0}) == 3


def test_a_bad_word_never_gets_its_last_token() -> None:
    logits = torch.tensor([9.0, 1.0, 5.0, 0.0])
    greedy: dict[str, Any] = {"temperature": 0.0, "bad_words": [[3, 1, 0], [2], [77], [-1, 0], []]}
    assert choose(logits, output_ids=[], **greedy) == 0
    assert choose(logits, output_ids=[1], **greedy) == 0
    assert choose(logits, output_ids=[3, 1], **greedy) == 1
    assert choose(logits, output_ids=[3, 1, 1], **greedy) == 0
    assert set(frequencies(logits, num_draws=200, temperature=2.0, bad_words=[[0], [2]])) == {1, 3}


@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3),
    seed=st.integers(0, 99),
    min_tokens=st.integers(0, 4),
)
@settings(max_examples=50)
def test_no_bad_word_stands_in_any_output(words: list[list[int]], seed: int, min_tokens: int) -> None:
    """Token 4 can always come."""
    logits, output = torch.tensor([0.5, 2.0, 1.0, 0.0, -1.0]), list[int]()
    for index in range(12):
        output.append(
            choose(logits, index, output_ids=output, seed=seed, bad_words=words, min_tokens=min_tokens)
        )
    placed = [output[at : at + len(word)] == word for word in words for at in range(len(output))]
    assert not any(placed)


def test_bans_hold_as_long_as_anything_is_left() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0])
    all_bad: dict[str, Any] = {"temperature": 0.0, "bad_words": [[0], [1], [2]]}
    assert choose(logits, **all_bad) == 2
    assert choose(logits, **all_bad, allowed_token_ids=[0, 1]) == 1
    assert choose(logits, temperature=0.0, allowed_token_ids=[2], min_tokens=1) == 2
    assert choose(logits, temperature=0.0, allowed_token_ids=[1, 2], bad_words=[[1]], min_tokens=1) == 1
    assert choose(logits, temperature=0.0, allowed_token_ids=[77]) == 2


def test_a_row_without_any_token_left_costs_the_batch_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0]] * 2)
    inputs = [
        SampleInput(SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=[0, 1, 2]), 0, [], []),
        SampleInput(SamplingParams(max_tokens=9, temperature=0.0), 0, [], []),
    ]
    assert sample(logits, inputs, EOS)[1].token_id == 2


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    params = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={2: 9.0}, num_logprobs=2)
    logprob = sample(logits.unsqueeze(0), [SampleInput(params, 0, [], [])], EOS)[0].logprob
    assert logprob is not None
    assert logprob.token_id == 2
    assert logprob.logprob == pytest.approx(float(logits[2]))
    assert [token_id for token_id, _ in logprob.top] == [0, 1]
    assert logprob.top[0][1] == pytest.approx(float(logits[0]))


def test_no_logprobs_and_only_the_chosen_ones() -> None:
    logits = torch.zeros(1, 3)
    without = SampleInput(SamplingParams(max_tokens=9), 0, [], [])
    chosen = SampleInput(SamplingParams(max_tokens=9, num_logprobs=0), 0, [], [])
    assert sample(logits, [without], EOS)[0].logprob is None
    logprob = sample(logits, [chosen], EOS)[0].logprob
    assert logprob is not None
    assert logprob.top == []


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_logits_the_first_is_chosen(dtype: torch.dtype) -> None:
    logits = torch.zeros(100, dtype=dtype)
    logits[[70, 30, 99]] = 2.0
    assert choose(logits, temperature=0.0) == 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_raise(bad: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 5, dtype=dtype)
    logits[1, 3] = bad
    greedy = SampleInput(SamplingParams(max_tokens=9, temperature=0.0), 0, [], [])
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        sample(logits, [greedy, greedy], EOS)


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 5), [], EOS) == []


def test_a_row_gets_the_same_token_in_any_company() -> None:
    """Rows of every kind, some of which need more than the most likely tokens."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 30.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 300},
        {"temperature": 0.7, "min_p": 0.05, "logit_bias": {5: 4.0}},
        {"temperature": 1.3, "repetition_penalty": 1.2, "min_tokens": 50},
        {"temperature": 0.0, "frequency_penalty": 1.5, "num_logprobs": 2},
    ]
    logits = 4 * torch.randn(len(kinds), 3000, generator=torch.manual_seed(1))
    for index in range(40):
        inputs = [
            SampleInput(SamplingParams(max_tokens=99, seed=row, **kind), index, [1, 2, 3], [4, 4, 5])
            for row, kind in enumerate(kinds)
        ]
        together = sample(logits, inputs, EOS)
        alone = [sample(logits[row : row + 1], [inputs[row]], EOS)[0] for row in range(len(kinds))]
        assert [each.token_id for each in together] == [each.token_id for each in alone]
        assert [each.logprob is None for each in together] == [True] * 6 + [False]


@pytest.mark.parametrize("vocab_size", [300, 16 * 20, 16 * 20 + 1, 5000, 5003])
def test_the_most_likely_are_those_of_a_full_sort(vocab_size: int) -> None:
    logits = torch.randperm(3 * vocab_size, generator=torch.manual_seed(0)).float().view(3, vocab_size)
    logits[0, : vocab_size // 2] = -torch.inf
    values, token_ids = _most_likely(logits, 20)
    expected = logits.sort(descending=True)
    assert torch.equal(values, expected.values[:, :20])
    assert torch.equal(token_ids, expected.indices[:, :20])
