"""Hermes 2 Pro, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import re
from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps
from flowkv_gateway.parsers.values import from_json


class Hermes(Parser):
    separates_calls = True

    def read(self) -> Steps[None]:
        yield from self.think("<think>", "</think>")
        while True:
            self.keep((yield from self.pass_on(self.tell, "<tool_call>")))
            yield from self.space()
            text = yield from self.brackets(CallWatch(self))
            if text and self.call(*name_and_arguments(text)):
                yield from self.space()
                yield from self.accept("</tool_call>")
            else:
                self.give_back()


class CallWatch:
    """Streams the arguments of a call that is a JSON object, if its name comes first and is a tool's."""

    _HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._head: list[str] = []
        self._is_in_head = True
        self._is_in_arguments = False

    def __call__(self, piece: str, num_open: int) -> None:
        """Of the object; it ends at the latest with the next bracket."""
        if self._is_in_arguments:
            self._parser.tell_arguments(piece)
            self._is_in_arguments = num_open > 1
        elif self._is_in_head:
            self._head.append(piece)
            self._is_in_head = num_open == 1
            head = None if self._is_in_head else self._HEAD.fullmatch("".join(self._head))
            if head and (name := from_json(head[1])) in self._parser.schemas:
                self._parser.call_begins(name)
                self._parser.tell_arguments("{")
                self._is_in_arguments = True


def name_and_arguments(text: str) -> tuple[str, Any]:
    """Of one call as a JSON object. Without a name it is none."""
    try:
        return of_object(from_json(text))
    except ValueError:
        return "", None


def of_object(call: object) -> tuple[str, Any]:
    """The same, of the object that was read.

    Some models write `parameters`, and some the JSON of their arguments as a string.
    """
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return "", None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = from_json(arguments)
    return name, {} if arguments is None else arguments
