"""What a decode node guesses of its sequences, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import SamplingParams
from flowkv_common.wire.nodes import StepFit
from flowkv_decode.drafts import NUM_SAME, Lookup, draft_lengths
from flowkv_decode.sequences import DecodeRole
from flowkv_engine.engine.batch import Sequence
from flowkv_node.measures import MEMORY_STEPS, StepSizes
from tests.drive import make_sequence

BLOCK_SIZE = 16
COPYING = list(range(20, 40))


class NaiveLookup:
    """Searches the whole text each time."""

    def __init__(self, text: list[int]) -> None:
        self.text, self.place = text, self._found(text)

    def add(self, token_id: int) -> None:
        goes_on = self.place is not None and self.text[self.place] == token_id
        self.text = [*self.text, token_id]
        self.place = self.place + 1 if goes_on and self.place is not None else self._found(self.text)

    def guess(self, num_tokens: int) -> list[int]:
        text = self.text.copy()
        for place in range(self.place, self.place + num_tokens) if self.place is not None else ():
            text.append(text[place])
        return text[len(self.text) :]

    def _found(self, text: list[int]) -> int | None:
        places = range(NUM_SAME, len(text))
        found = [place for place in places if text[place - NUM_SAME : place] == text[-NUM_SAME:]]
        return found[-1] if found else None


TOKENS = st.lists(st.integers(0, 2), max_size=30)


@given(TOKENS, TOKENS)
def test_a_text_goes_on_as_it_did_after_the_same_tokens(prompt: list[int], output: list[int]) -> None:
    sequence = make_sequence([9, *prompt])
    lookup, naive = Lookup(0.5), NaiveLookup([9, *prompt])
    for token_id in (None, *output):
        if token_id is not None:
            sequence.output_ids.append(token_id)
            naive.add(token_id)
        lookup.follow(sequence)
        assert list(lookup.guess(5)) == naive.guess(5)


def test_chances_are_learned_without_a_draft() -> None:
    copies, invents = (make_sequence(COPYING + COPYING[:3]) for _ in range(2))
    lookups = Lookup(0.5), Lookup(0.5)
    for place in range(3, 18):
        for lookup, sequence in zip(lookups, (copies, invents), strict=True):
            lookup.follow(sequence)
        copies.output_ids.append(COPYING[place])
        # What stood there before, and something else after it.
        invents.output_ids += [100 + place, *COPYING[:3]]
    for lookup, sequence in zip(lookups, (copies, invents), strict=True):
        lookup.follow(sequence)
    far, near = (lookup.chances(9) for lookup in lookups)
    assert far == sorted(far, reverse=True)
    assert far[-1] > 0.5 > near[0] > near[-1]
    assert Lookup(0.5).chances(9) == []


def lengths(chances: list[float], base_s: float, each_s: float, most: int = 48) -> list[int]:
    """`chances`: that a guess is right when those before it are; 0: there is none."""
    given = [[chance**place for place in range(1, 16)] if chance else [] for chance in chances]
    return draft_lengths(given, most, lambda num: base_s + each_s * (len(chances) + num))


def test_as_many_as_give_the_most_tokens_per_second() -> None:
    assert lengths([0.0], 1.0, 0.0) == [0]  # there is nothing to guess
    assert lengths([0.9], 1.0, 0.0) == [15]  # they cost nothing
    assert lengths([0.9], 0.0, 1.0) == [0]  # a token less in time costs as much
    assert lengths([0.1], 1.0, 0.2) == [0]
    [few], [many] = lengths([0.6], 1.0, 0.1), lengths([0.95], 1.0, 0.1)
    assert 0 < few < many
    # They compete, and in a large batch each one has less of the step's base to save.
    assert lengths([0.9, 0.0, 0.5], 1.0, 0.1, most=4) == [4, 0, 0]
    assert max(lengths([0.5] * 16, 1.0, 0.1)) < lengths([0.5], 1.0, 0.1)[0]


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 2.0), min_size=7, max_size=7),
)
def test_no_other_number_of_guesses_would_be_better(chances: list[float], costs: list[float]) -> None:
    """Whatever steps of a size cost."""

    def rate(numbers: list[int]) -> float:
        gains = (
            chance**place
            for chance, number in zip(chances, numbers, strict=True)
            for place in range(1, number + 1)
        )
        return (len(chances) + sum(gains)) / costs[sum(numbers)]

    chosen = rate(draft_lengths([[one, one**2] for one in chances], 6, costs.__getitem__))
    options = [[]]  # type: list[list[int]]
    for _ in chances:
        options = [[*option, number] for option in options for number in range(3)]
    assert chosen == pytest.approx(max(map(rate, options)))


def role_of(speculation: str = "ngram", max_num_seqs: int = 64) -> DecodeRole:
    """On a node whose steps take as long for any number of tokens."""
    fit = StepFit(base_s=0.03, prefill_token_s=0, attended_token_s=0, sequence_s=0, context_token_s=0)
    sizes = StepSizes()
    node: Any = SimpleNamespace(
        settings=SimpleNamespace(block_size=BLOCK_SIZE, max_num_seqs=max_num_seqs, speculation=speculation),
        instruments=SimpleNamespace(step_fitter=SimpleNamespace(fit=lambda: fit), step_sizes=sizes),
        card=SimpleNamespace(max_model_len=2048),
    )
    return DecodeRole(node)


def running(num_blocks: int = 4, **sampling: Any) -> Sequence:
    """Its next tokens stand in its prompt."""
    params = SamplingParams(**{"max_tokens": 64, **sampling})
    sequence = make_sequence(COPYING + COPYING[:4], list(range(num_blocks)), params)
    sequence.output_ids.append(COPYING[4])
    sequence.num_computed_tokens = sequence.num_tokens - 1
    return sequence


def test_a_draft_ends_with_the_blocks_and_before_the_last_token() -> None:
    sequence = running(num_blocks=2)
    [draft] = role_of().drafts([sequence])
    assert draft == tuple(COPYING[5 : 5 + 2 * BLOCK_SIZE - sequence.num_tokens])
    assert [len(each) for each in role_of().drafts([running(max_tokens=4)])] == [2]
    role: Any = role_of()
    role._node.card.max_model_len = sequence.num_tokens + 2
    assert [len(each) for each in role.drafts([sequence])] == [1]


def test_guesses_take_free_places_only_and_none_when_off() -> None:
    assert role_of("off").drafts([running()]) == [()]
    assert role_of(max_num_seqs=1).drafts([running()]) == [()]
    assert sum(map(len, role_of(max_num_seqs=5).drafts([running(), running()]))) == 3
    assert role_of().drafts([]) == []


def test_what_a_size_costs_is_learned_and_forgotten() -> None:
    sizes = StepSizes()
    for _ in range(30):
        sizes.observe(3, duration_s=0.15, predicted_s=0.1)
    assert sizes.correct(3, 1.0) == pytest.approx(1.5, rel=0.05)
    assert sizes.correct(4, 1.0) == 1.0
    for _ in range(5 * MEMORY_STEPS):
        sizes.observe(1, duration_s=0.1, predicted_s=0.1)
    assert sizes.correct(3, 1.0) == pytest.approx(1.0, abs=0.01)
    sizes.observe(5, duration_s=9.0, predicted_s=0.1)  # held up, once
    assert sizes.correct(5, 1.0) < 1.3
