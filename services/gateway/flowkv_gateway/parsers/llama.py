"""Llama 3.1 to 4: a call is the whole answer, as JSON or as a list of Python calls.

`{"name": ..., "parameters": {...}}`, several of them with `;` between, or `[f(a=1), g()]`. The answer may
begin with text if `<|python_tag|>` or `<|python_start|>` comes before the call.
"""

from __future__ import annotations

from typing import Any

from flowkv_gateway.parsers.hermes import CallWatch, of_object
from flowkv_gateway.parsers.reading import Parser, Steps
from flowkv_gateway.parsers.values import Literals, from_json


class Llama(Parser):
    def read(self) -> Steps[None]:
        self.tell((yield from self.space()))
        self.keep("")
        while True:
            yield from self._calls()
            self.keep((yield from self.pass_on(self.tell, "<|python_tag|>", "<|python_start|>")))

    def _calls(self) -> Steps[None]:
        """All calls that come next; what was kept is given back if there are none."""
        separator = ";"
        while separator == ";":
            yield from self.space()
            # Nothing marks a call as one, so text is one only if it names tools that are offered.
            text = (yield from self.brackets(CallWatch(self), quotes="\"'")) if self.schemas else ""
            calls = _parse(text)
            if not calls or not all(name in self.schemas and isinstance(args, dict) for name, args in calls):
                self.give_back()
                return
            for name, arguments in calls:
                self.call(name, arguments)
            yield from self.space()
            if separator := (yield from self.accept("<|python_end|>", ";")):
                self.keep(separator)
        self.forget()


def _parse(text: str) -> list[tuple[str, Any]]:
    try:
        calls = from_json(text)
        return [of_object(call) for call in (calls if isinstance(calls, list) else [calls])]
    except ValueError:
        pass
    try:
        return Literals(text).calls()
    except ValueError:
        return []
