"""Text from tokens: exact for any text and any split, with nothing of it cut in two."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from flowkv_common.wire.messages import SamplingParams
from flowkv_gateway.output import Choice, Display, StopFinder, prepare_stops
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.tokenizer import Vocabulary
from tests.gateway_support import token_chunk, write_tokenizer


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawTokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return RawTokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def vocabulary(raw: RawTokenizer) -> Vocabulary:
    return Vocabulary.from_json(json.loads(raw.to_str()), raw.get_vocab(with_added_tokens=True))


def decode(vocabulary: Vocabulary, token_ids: list[int]) -> list[str]:
    """The text that each token completes, and at last what can't be completed."""
    request = RequestState("r", [1], SamplingParams(max_tokens=1), 60.0, "f")
    choice = Choice(0, request, vocabulary, Display(shows_special=True))
    deltas = [*choice.push(token_chunk(*token_ids)), *choice.push(token_chunk(finish_reason="length"))]
    return [delta.text for delta in deltas]


@given(text=st.text())
def test_chunks_join_to_the_text(raw: RawTokenizer, vocabulary: Vocabulary, text: str) -> None:
    chunks = decode(vocabulary, raw.encode(text, add_special_tokens=False).ids)
    assert "".join(chunks) == text


@given(token_ids=st.lists(st.integers(0, 420), max_size=40))
def test_any_tokens_decode_as_tokenizers_does(
    raw: RawTokenizer, vocabulary: Vocabulary, token_ids: list[int]
) -> None:
    assert "".join(decode(vocabulary, token_ids)) == raw.decode(token_ids, skip_special_tokens=False)


def test_a_character_comes_whole_with_its_last_token(raw: RawTokenizer, vocabulary: Vocabulary) -> None:
    token_ids = raw.encode("\U0001f600", add_special_tokens=False).ids
    assert len(token_ids) == 4
    assert decode(vocabulary, token_ids) == ["", "", "", "\U0001f600", ""]
    assert decode(vocabulary, token_ids[:2])[-1] == "\ufffd"


def test_time_is_linear_in_the_output(raw: RawTokenizer, vocabulary: Vocabulary) -> None:
    # Bytes that never become a character are what makes others quadratic.
    half = raw.encode("\U0001f600", add_special_tokens=False).ids[:1]

    def seconds(num_tokens: int) -> float:
        start = time.process_time()
        decode(vocabulary, half * num_tokens)
        return time.process_time() - start

    assert min(seconds(32_000) for _ in range(3)) < 24 * min(seconds(4_000) for _ in range(3))


def test_sentencepiece_vocabulary() -> None:
    decoder = {
        "type": "Sequence",
        "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip"}],
    }
    vocab = {"<s>": 0, "\u2581hi": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}
    tokenizer_json = {"decoder": decoder, "added_tokens": [{"id": 0, "content": "<s>", "special": True}]}
    vocabulary = Vocabulary.from_json(tokenizer_json, vocab)
    assert decode(vocabulary, [0, 1, 2, 3, 4]) == ["<s>", " hi", "", "", "\u20ac", ""]
    assert vocabulary.token_text(0) == "<s>"
    assert vocabulary.token_text(2) == "bytes:\\xe2"


def test_a_decoder_that_needs_more_than_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="WordPiece"):
        Vocabulary.from_json({"decoder": {"type": "WordPiece"}}, {})


def naive_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that ends first; the longest of those that end there."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


LETTERS = st.text(alphabet="ab", max_size=12)


@given(chunks=st.lists(LETTERS, max_size=6), stops=st.lists(LETTERS.filter(bool), max_size=4))
def test_stop_strings_at_any_split(chunks: list[str], stops: list[str]) -> None:
    finder = StopFinder(prepare_stops(stops))
    shown = [finder.push(chunk) for chunk in chunks]
    whole = "".join(chunks)
    assert "".join(shown) + finder.finish() == naive_stop(whole, stops)
    assert (finder.found in stops) == any(stop in whole for stop in stops)


SPECIAL = "<a>"
PIECES = st.lists(
    st.sampled_from(["a", "b", "ab", "<", ">", "<a", "a>"]).map(lambda text: (text, True))
    | st.just((SPECIAL, False)),
    max_size=10,
)


def naive_stop_with_hidden(pieces: list[tuple[str, bool]], stops: list[str], keeps_stop: bool) -> str:
    """Character by character: does a stop string end here, in all of the text or in the shown part?"""
    chars = [(char, is_shown) for text, is_shown in pieces for char in text]
    for end in range(1, len(chars) + 1):
        begins = []
        for stop in stops:
            seen = [at for at in range(end) if chars[at][1] or SPECIAL in stop]
            last = seen[-len(stop) :]
            if last and last[-1] == end - 1 and "".join(chars[at][0] for at in last) == stop:
                begins.append(last[0])
        if begins:
            cut = end if keeps_stop else min(begins)
            return "".join(char for char, is_shown in chars[:cut] if is_shown)
    return "".join(char for char, is_shown in chars if is_shown)


STOPS = st.lists(
    st.text("ab<>", min_size=1, max_size=4) | st.sampled_from([SPECIAL, "b<a>", "<a>a"]), max_size=3
)


@given(pieces=PIECES, stops=STOPS, keeps_stop=st.booleans())
def test_stop_strings_with_special_tokens_among_the_text(
    pieces: list[tuple[str, bool]], stops: list[str], keeps_stop: bool
) -> None:
    finder = StopFinder(prepare_stops(stops, {SPECIAL}), keeps_stop=keeps_stop)
    shown = "".join(finder.push(text, is_shown=is_shown) for text, is_shown in pieces) + finder.finish()
    assert shown == naive_stop_with_hidden(pieces, stops, keeps_stop)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    finder = StopFinder(prepare_stops(["END"]))
    assert [finder.push(text) for text in ("say E", "N", "G ", "E", "ND!", "more")] == [
        "say ",
        "",
        "ENG ",
        "",
        "",
        "",
    ]
    assert finder.found
    assert finder.finish() == ""
    unfinished = StopFinder(prepare_stops(["END"]))
    assert unfinished.push("the EN") + unfinished.finish() == "the EN"


@pytest.mark.parametrize("stops", [["\n\n"], ["\n\n", "\n<a>b"]])
def test_special_tokens_without_end_take_linear_time(stops: list[str]) -> None:
    def seconds(num_tokens: int) -> float:
        finder = StopFinder(prepare_stops(stops, {SPECIAL}))
        start = time.process_time()
        assert finder.push("text\n") == "text"
        for _ in range(num_tokens):
            assert finder.push(SPECIAL, is_shown=False) == ""
        assert finder.push("\n") == ""
        took = time.process_time() - start
        assert finder.found
        return took

    assert min(seconds(8_000) for _ in range(3)) < 24 * min(seconds(1_000) for _ in range(3))
