"""Grammars, compiled by llguidance for one tokenizer: what an answer may go on with.

The gateway compiles a grammar to check it, nodes to keep to it.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from flowkv_common.added_tokens import marks_of, rename
from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import Grammar

# As many as a batch has sequences: those of one batch stay compiled, whatever comes and goes.
MAX_COMPILED = 64
# Between the tokens of JSON. Bounded: a model that likes spaces would write nothing else.
WHITESPACE = r"\x20|\x0A{1,2}[\x20\x09]{0,20}"
JSON_OPTIONS: Any = {"lenient": False, "whitespace_pattern": WHITESPACE}


# Of the text of a grammar: names of tokens, and all that may hold one which is none: strings, regular
# expressions, classes of characters.
_NAMES = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|\[(?:\\.|[^\]\\])*\]|<[^<>\s]+>')


class _Tokens(NamedTuple):
    """`marks`: ids of tokens that are no text, by the names that grammars may call them."""

    tokenizer: LLTokenizer
    marks: Mapping[str, int]


class Grammars:
    """The latest grammars, compiled. Threads may share it.

    The tokenizer is read with the first grammar: up to a second, and tens of MB.
    """

    def __init__(self, tokenizer_file: Path, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_file = tokenizer_file
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()  # of the tokenizer and of the next
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of `grammar`. Raises BadRequest with what can't be followed in it."""
        with self._lock:
            compiled, tokens = self._compiled.pop(grammar, None), self._tokens
        # Without the lock: no one waits for another's grammar.
        compiled = compiled or _compile(grammar, tokens)
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    @property
    def num_mask_bytes(self) -> int:
        """Of a mask, which has a bit per token of the tokenizer, in words of 4 bytes. Raises BadRequest."""
        with self._lock:
            return (self._tokens.tokenizer.vocab_size + 31) // 32 * 4

    @cached_property
    def _tokens(self) -> _Tokens:
        """Of text that must come, llguidance makes tokens. A text like that of a mark would become the mark.

        So marks have other texts here, which no one can guess.
        """
        try:
            source = msgspec.json.decode(self._tokenizer_file.read_bytes())
            marks, nonce = marks_of(source), secrets.token_hex(8)
            rename(source, {text: f"<{nonce}-{token_id}>" for text, token_id in marks.items()})
            # Without any EOS any token will do: an answer ends with its grammar anyway.
            tokenizer = LLTokenizer(
                msgspec.json.encode(source).decode(), eos_token=self._eos_token_ids or None
            )
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise BadRequest(f"Output can't be constrained with this model's tokenizer: {error}") from error
        return _Tokens(tokenizer, marks)


# Its defaults, which bound the time of a mask to some 20 ms; without the states of its parser in messages.
_LIMITS = LLParserLimits(verbose_errors=False)


def _compile(grammar: Grammar, tokens: _Tokens) -> LLMatcher:
    matcher = LLMatcher(tokens.tokenizer, _source(grammar, tokens.marks), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise BadRequest(matcher.get_error())
    return matcher


def _source(grammar: Grammar, marks: Mapping[str, int]) -> str:
    """What llguidance takes. Raises BadRequest."""
    match grammar.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
            except ValueError as error:
                raise BadRequest(str(error)) from None
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case "ebnf":
            try:
                return grammar_from("ebnf", _NAMES.sub(lambda found: _by_id(found[0], marks), grammar.text))
            except ValueError as error:
                raise BadRequest(str(error)) from None
    raise BadRequest(f"There is no kind of grammar {grammar.kind!r}.")


def _by_id(name: str, marks: Mapping[str, int]) -> str:
    return f"<[{marks[name]}]>" if name in marks else name
