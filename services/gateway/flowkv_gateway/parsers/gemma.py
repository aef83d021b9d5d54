"""Gemma: `<|tool_call>call:name{key:value}<tool_call|>`, in a notation with bare keys and `<|"|>` as quotes.

FunctionGemma writes the same between other special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps
from flowkv_gateway.parsers.values import MAX_DEPTH, from_json


class Gemma(Parser):
    begin, end, quote = "<|tool_call>", "<tool_call|>", '<|"|>'

    def read(self) -> Steps[None]:
        if (yield from self.reasoning_begins("<|channel>thought\n")):
            yield from self.pass_on(self.tell_reasoning, "<channel|>")
            self.reasoning_is_over()
        while True:
            self.keep((yield from self.pass_on(self.tell, self.begin)))
            pieces: list[str] = []
            marker = ""
            while marker != self.end:
                text, marker = yield from self.until(self.end, self.quote)
                pieces += text, marker
                if marker == self.quote:
                    text, _ = yield from self.until(self.quote)
                    pieces += text, self.quote
            if not self._call("".join(pieces[:-1])):
                self.give_back()

    def _call(self, text: str) -> bool:
        name, brace, rest = text.strip().removeprefix("call:").partition("{")
        try:
            return bool(brace) and self.call(name.strip(), Notation(brace + rest, self.quote).whole())
        except ValueError:
            return False


class FunctionGemma(Gemma):
    begin, end, quote = "<start_function_call>", "<end_function_call>", "<escape>"


class Notation:
    """Reads a value in Gemma's notation. Methods raise ValueError where the text is something else."""

    def __init__(self, text: str, quote: str) -> None:
        self._quote = quote
        mark = re.escape(quote)
        tokens = re.split(rf"({mark}.*?{mark}|[{{}}\[\],:])", text, flags=re.DOTALL)
        self._tokens = [token for token in tokens if token.strip()]
        self._place = 0

    def whole(self) -> Any:
        value = self._value(depth=0)
        if self._place != len(self._tokens):
            raise ValueError("text after the value")
        return value

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        token = self._next()
        if token == "{":
            return dict(self._items("}", lambda: self._member(depth + 1)))
        if token == "[":
            return self._items("]", lambda: self._value(depth + 1))
        if token.startswith(self._quote):
            return self._string(token)
        return from_json(token)

    def _member(self, depth: int) -> tuple[str, Any]:
        key = self._next()
        if self._next() != ":":
            raise ValueError("a key without a value")
        return self._string(key), self._value(depth)

    def _items(self, closing: str, read: Callable[[], Any]) -> list[Any]:
        items = []
        while self._peek() != closing:
            items.append(read())
            if self._peek() != closing and self._next() != ",":
                raise ValueError("no comma")
        self._place += 1
        return items

    def _string(self, token: str) -> str:
        return token.strip().removeprefix(self._quote).removesuffix(self._quote)

    def _peek(self) -> str:
        if self._place == len(self._tokens):
            raise ValueError("the value breaks off")
        return self._tokens[self._place]

    def _next(self) -> str:
        token = self._peek()
        self._place += 1
        return token
