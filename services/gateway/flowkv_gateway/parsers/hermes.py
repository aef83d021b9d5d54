"""Hermes 2 Pro, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

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
            text = yield from self.brackets()
            if text and self.call(*name_and_arguments(text)):
                yield from self.space()
                yield from self.accept("</tool_call>")
            else:
                self.give_back()


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
