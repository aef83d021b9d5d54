"""The text of a prompt, and where its tokens begin."""

from __future__ import annotations

import pytest

from flowkv_gateway.echo import spelled
from flowkv_gateway.tokenizer import Vocabulary

# As with SentencePiece: a token at the beginning has a space of its own.
VOCABULARY = Vocabulary(
    {0: b"<s>", 1: b" one", 2: b" two", 3: b"\xe2\x82", 4: b"\xac", 5: b"!"}, frozenset({0})
)


@pytest.mark.parametrize(
    ("token_ids", "given", "text", "offsets"),
    [
        ([1, 2], None, " one two", [0, 4]),
        (
            [0, 1, 3, 4, 5],
            None,
            " one\u20ac!",
            [0, 0, 4, 4, 5],
        ),  # half a character has no place of its own
        ([1, 3], None, " one\ufffd", [0, 4]),
        ([0, 1, 2], "one two", "one two", [0, 0, 3]),  # what the tokenizer has put in front has no place
        ([0, 5, 0, 5], "!<s>!", "!<s>!", [0, 0, 1, 4]),  # typed, other than the first
        ([1, 2], "one", "one", [0, 0]),  # a tokenizer that loses text
        ([1], "one and more", "one and more", [8]),
        ([], None, "", []),
    ],
)
def test_where_tokens_begin(token_ids: list[int], given: str | None, text: str, offsets: list[int]) -> None:
    assert spelled(token_ids, VOCABULARY, given, shows_special=False) == (text, offsets)


def test_special_tokens_are_shown_to_who_wants_them() -> None:
    assert spelled([0, 1], VOCABULARY, None, shows_special=True) == ("<s> one", [0, 3])
