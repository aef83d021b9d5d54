"""Guesses of what a sequence says next, out of its own text, and how many of them are worth a step.

An answer that repeats its prompt or itself (an edit, a quotation, code) goes on as it did after the same
words before: prompt lookup. Guesses change no token: a step draws each from the same logits with the same
random number, and what follows a wrong guess is dropped. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul

from flowkv_engine.engine.batch import Sequence

# Tokens that must recur: after pairs another token often follows, and more of them come late after a change.
NUM_SAME = 3
# Least weight of the newest in a share of right guesses: about the last ten count, as text changes.
SMOOTHING = 0.1
# What was known before counts as two guesses: Laplace's rule of succession.
PRIOR = 2


class Drafts:
    """The guesses of a node's sequences."""

    def __init__(self) -> None:
        self._lookups: dict[str, Lookup] = {}  # by transfer id
        self._chance = 0.5  # of a sequence's first guess: what others had last

    def forget(self, transfer_id: str) -> None:
        if lookup := self._lookups.pop(transfer_id, None):
            self._chance += SMOOTHING * (lookup.chance - self._chance)

    def choose(
        self, sequences: list[Sequence], longest: list[int], most: int, cost_s: Callable[[int], float]
    ) -> list[tuple[int, ...]]:
        """A draft for each sequence of the next step, at most so long, `most` tokens in all.

        As many as give the most tokens per second. `cost_s`: seconds of the step with so many guesses.
        """
        chances: list[list[float]] = []
        lookups: list[Lookup] = []
        for sequence, length in zip(sequences, longest, strict=True):
            if (lookup := self._lookups.get(sequence.transfer_id)) is None:
                lookup = self._lookups[sequence.transfer_id] = Lookup(self._chance)
            lookup.follow(sequence)
            lookups.append(lookup)
            chances.append(lookup.chances(min(length, most)))
        lengths = draft_lengths(chances, most, cost_s)
        return [lookup.guess(length) for lookup, length in zip(lookups, lengths, strict=True)]


def draft_lengths(chances: list[list[float]], most: int, cost_s: Callable[[int], float]) -> list[int]:
    """By sequence. `chances`: of each of its guesses, that it counts; each is less than the one before."""
    guesses = sorted(
        ((chance, number) for number, mine in enumerate(chances) for chance in mine), reverse=True
    )
    guesses = guesses[:most]
    lengths = [0] * len(chances)
    if not guesses or (without_s := cost_s(0)) <= 0.0:
        return lengths
    expected = float(len(chances))  # tokens of the step
    best, num_best = expected / without_s, 0
    for num_guesses, (chance, _) in enumerate(guesses, 1):
        expected += chance
        if (rate := expected / cost_s(num_guesses)) > best:
            best, num_best = rate, num_guesses
    for _, number in guesses[:num_best]:
        lengths[number] += 1
    return lengths


class Lookup:
    """A sequence's tokens, and where they stood before. A few microseconds per token, once each.

    Guesses are judged whether a step computes them or not, so chances need no trials that cost.
    """

    def __init__(self, chance: float) -> None:
        self.chance = chance  # that the first guess after a new match is right
        self._num_first = 0  # such guesses so far
        self._num_right = 0  # guesses since the last one, in a row
        self._token_ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text last went on after these tokens
        self._place: int | None = None  # of the next guess in the text

    def chances(self, num_tokens: int) -> list[float]:
        """That the first guess is right, the first two are, and so on; none where there is no guess.

        The longer a text has gone on as before, the further it will.
        """
        if self._place is None:
            return []
        in_a_row = range(self._num_right, self._num_right + num_tokens)
        expected = PRIOR * self.chance
        return list(accumulate(((right + expected) / (right + PRIOR) for right in in_a_row), mul))

    def follow(self, sequence: Sequence) -> None:
        """Takes in the tokens that the sequence has got since the last time."""
        if not self._token_ids:
            self._begin(sequence.prompt_ids + sequence.output_ids)
        for token_id in sequence.tokens_between(len(self._token_ids), sequence.num_tokens):
            if self._place is not None:
                is_right = self._token_ids[self._place] == token_id
                if not self._num_right:
                    self._num_first += 1
                    weight = max(SMOOTHING, 1 / (PRIOR + self._num_first))
                    self.chance += weight * (is_right - self.chance)
                # A text that goes on is more alike than one with only the last tokens in common.
                self._place = self._place + 1 if is_right else None
                self._num_right = self._num_right + 1 if is_right else 0
            self._token_ids.append(token_id)
            self._look_up()

    def guess(self, num_tokens: int) -> tuple[int, ...]:
        """The next tokens: the text from the place on, and itself again where it ends."""
        if self._place is None:
            return ()
        place, period = self._place, len(self._token_ids) - self._place
        return tuple(self._token_ids[place + number % period] for number in range(num_tokens))

    def _begin(self, token_ids: list[int]) -> None:
        """All but the newest at once, ten times as fast as one by one."""
        self._token_ids = token_ids
        words = zip(*(token_ids[start:] for start in range(NUM_SAME)), strict=False)
        self._after = dict(zip(words, range(NUM_SAME, len(token_ids)), strict=False))
        self._look_up()

    def _look_up(self) -> None:
        words = tuple(self._token_ids[-NUM_SAME:])
        if self._place is None:
            self._place = self._after.get(words)
        self._after[words] = len(self._token_ids)
