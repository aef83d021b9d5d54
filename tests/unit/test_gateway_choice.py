"""One answer in the making: one delta per token, and what each of them shows."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from flowkv_common.wire.messages import SamplingParams, TokenLogprob
from flowkv_gateway.output import ChatWriter, Choice, Delta, Display, OpenAIWriter, TextWriter, prepare_stops
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.schemas import ChoicesRequest
from flowkv_gateway.tokenizer import Vocabulary
from tests.gateway_support import no_usage, token_chunk

VOCABULARY = Vocabulary(
    {0: b"<|end|>", 1: b"one", 2: b" two", 3: b" thr", 4: b"ee", 5: b"\xe2", 6: b"\x82\xac"}, frozenset({0})
)
PLAIN = ChoicesRequest()


def make_choice(stops: tuple[str, ...] = (), min_tokens: int = 0, **display: Any) -> Choice:
    sampling = SamplingParams(max_tokens=9, min_tokens=min_tokens)
    request = RequestState("cmpl-1", [1], sampling, 60.0, "f")
    return Choice(3, request, VOCABULARY, Display(prepare_stops(stops, VOCABULARY.special_texts), **display))


def push(choice: Choice, *token_ids: int, finish_reason: str | None = None) -> list[Delta]:
    return list(choice.push(token_chunk(*token_ids, finish_reason=finish_reason)))


def test_one_delta_per_token_also_within_a_chunk() -> None:
    choice = make_choice()
    deltas = push(choice, 1, 2) + push(choice, 5) + push(choice, 6, 0, finish_reason="stop")
    assert [delta.text for delta in deltas] == ["one", " two", "", "\u20ac", ""]
    assert [delta.is_first for delta in deltas] == [True, False, False, False, False]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["stop"]
    assert [delta.text_offset for delta in deltas] == [0, 3, 7, 7, 8]
    assert (choice.num_tokens, choice.finish_reason) == (5, "stop")


def test_a_stop_string_over_tokens_ends_the_answer_before_it() -> None:
    choice = make_choice(stops=("o three",))
    deltas = push(choice, 1, 2) + push(choice, 3, 4, 1, 1)
    assert "".join(delta.text for delta in deltas) == "one tw"
    assert (choice.finish_reason, choice.num_tokens) == ("stop", 4)


def shown(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("stop", ["<|end|>", " two<|end|>", "<|end|>one"])
def test_a_stop_string_sees_special_tokens_that_are_not_shown(stop: str) -> None:
    choice = make_choice(stops=(stop,))
    assert shown(push(choice, 1, 2, 0, 1, 2)) == ("one" if stop.startswith(" two") else "one two")
    assert choice.finish_reason == "stop"


def test_other_stop_strings_do_not_see_them() -> None:
    choice = make_choice(stops=("two three", "end"))
    assert shown(push(choice, 1, 2, 0, 3, 4)) == "one "
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("display", "text"),
    [({}, "one"), ({"shows_stop": True}, "one two"), ({"shows_special": True}, "one")],
)
def test_an_ordinary_token_that_ended_the_text_is_not_shown(display: dict[str, Any], text: str) -> None:
    choice = make_choice(stop_ids=frozenset({2}), **display)
    assert shown(push(choice, 1, 2, finish_reason="stop")) == text
    assert choice.num_tokens == 2
    # It has ended nothing here: EOS is ignored, or did not count yet.
    assert shown(push(make_choice(stop_ids=frozenset({2})), 1, 2, 1, finish_reason="length")) == "one twoone"


def test_special_tokens_and_stop_strings_are_shown_to_who_wants_them() -> None:
    special = make_choice(stop_ids=frozenset({0}), shows_special=True)
    assert shown(push(special, 1, 0, 2)) == "one<|end|> two"
    assert shown(push(special, 0, finish_reason="stop")) == ""
    assert shown(push(make_choice(stops=("o thr",), shows_stop=True), 1, 2, 3, 4)) == "one two thr"


def test_stop_strings_are_prepared_once_for_all_choices() -> None:
    request = RequestState("cmpl-1", [1], SamplingParams(max_tokens=9), 60.0, "f")
    start = time.process_time()
    display = Display(prepare_stops(["ab" * 500] * 16, VOCABULARY.special_texts))
    prepared = time.process_time()
    for index in range(128):
        Choice(index, request, VOCABULARY, display)
    assert time.process_time() - prepared < 5 * (prepared - start)


def test_text_held_back_comes_with_the_end() -> None:
    choice = make_choice(stops=(" twins",))
    deltas = push(choice, 1, 2, 5, finish_reason="length")
    assert [delta.text for delta in deltas] == ["one", " two", "\ufffd"]
    held = make_choice(stops=(" two!",))
    assert [delta.text for delta in push(held, 1, 2, finish_reason="length")] == ["one", " two"]


def test_stop_strings_wait_for_min_tokens() -> None:
    choice = make_choice(stops=("one",), min_tokens=2)
    deltas = push(choice, 1, 1, 1)
    assert [delta.text for delta in deltas] == ["one", "one", ""]
    assert choice.finish_reason == "stop"


def test_an_end_without_a_token() -> None:
    choice = make_choice(stops=("one two three",))
    assert push(choice, 1)[0].text == ""
    [delta] = push(choice, finish_reason="length")
    assert (delta.text, delta.finish_reason, choice.num_tokens) == ("one", "length", 1)


def logprob_delta() -> Delta:
    logprob = TokenLogprob(token_id=5, logprob=-0.5, top=[(5, -0.5), (1, -math.inf), (2, math.nan)])
    return Delta(0, "", True, None, logprob, 4, 7)


def test_tokens_of_one_text_do_not_hide_each_other() -> None:
    """As with byte fallback: `\n` is a token of its own and one of the bytes."""
    vocabulary = Vocabulary({1: b"\n", 2: b"\n", 3: b"a", 4: b"\n"}, frozenset())
    top = [(1, -0.5), (2, -1.0), (3, -2.0)]

    def shown_top(chosen: int, value: float) -> dict[str, float]:
        logprob = TokenLogprob(token_id=chosen, logprob=value, top=top)
        delta = Delta(0, "", True, None, logprob, 0, chosen)
        logprobs = TextWriter(vocabulary, "m", PLAIN).choice([delta], is_chunk=False)["logprobs"]
        shown: dict[str, float] = logprobs["top_logprobs"][0]
        assert shown[logprobs["tokens"][0]] == value
        return shown

    assert shown_top(1, -0.5) == {"\n": -0.5, "token_id:2": -1.0, "a": -2.0}
    assert shown_top(2, -1.0) == {"token_id:1": -0.5, "\n": -1.0, "a": -2.0}
    assert shown_top(4, -9.0) == {"token_id:1": -0.5, "token_id:2": -1.0, "a": -2.0, "\n": -9.0}
    assert shown_top(3, -2.0) == {"\n": -0.5, "token_id:2": -1.0, "a": -2.0}


def test_chat_logprobs() -> None:
    logprobs = ChatWriter(VOCABULARY, "m", PLAIN).choice([logprob_delta()], is_chunk=True)["logprobs"]
    [entry] = logprobs["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("bytes:\\xe2", -0.5, [0xE2])
    assert [(top["token"], top["logprob"], bytes(top["bytes"])) for top in entry["top_logprobs"]] == [
        ("bytes:\\xe2", -0.5, b"\xe2"),
        ("one", -9999.0, b"one"),
        (" two", -9999.0, b" two"),
    ]


def test_completion_logprobs() -> None:
    logprobs = TextWriter(VOCABULARY, "m", PLAIN).choice([logprob_delta()], is_chunk=False)["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2"]
    assert logprobs["token_logprobs"] == [-0.5]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe2": -0.5, "one": -9999.0, " two": -9999.0}]
    assert logprobs["text_offset"] == [4]


@pytest.mark.parametrize("kind", [ChatWriter, TextWriter])
def test_no_logprobs_unless_asked_for(kind: type[OpenAIWriter]) -> None:
    delta = Delta(0, "one", True, None, None, 0, 7)
    for is_chunk in (True, False):
        assert kind(VOCABULARY, "m", PLAIN).choice([delta], is_chunk=is_chunk)["logprobs"] is None


@pytest.mark.parametrize("kind", [ChatWriter, TextWriter])
def test_token_ids_are_shown_only_when_asked_for(kind: type[OpenAIWriter]) -> None:
    delta = Delta(0, "one", True, None, None, 0, 7)
    for is_chunk in (True, False):
        choice = kind(VOCABULARY, "m", ChoicesRequest(return_token_ids=True)).choice(
            [delta], is_chunk=is_chunk
        )
        assert choice["token_ids"] == [7]
    assert b"token_ids" not in kind(VOCABULARY, "m", PLAIN).delta(delta, no_usage)
