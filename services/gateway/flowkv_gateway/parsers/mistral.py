"""Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, and from v11 on `[TOOL_CALLS]name[ARGS]{...}`.

Reasoning models write `[THINK]...[/THINK]`, the first of them `<think>...</think>`.
"""

from __future__ import annotations

from typing import Any

from flowkv_gateway.parsers.hermes import of_object
from flowkv_gateway.parsers.reading import Parser, Steps
from flowkv_gateway.parsers.values import from_json


class Mistral(Parser):
    def read(self) -> Steps[None]:
        if opened := (yield from self.reasoning_begins("[THINK]", "<think>")):
            yield from self.pass_on(self.tell_reasoning, "[/THINK]" if opened == "[THINK]" else "</think>")
            self.reasoning_is_over()
        marker = yield from self.pass_on(self.tell, "[TOOL_CALLS]")
        while True:
            self.keep(marker)
            yield from self.space()
            is_call = yield from (self._list() if (yield from self.next_is("[")) else self._named())
            if not is_call:
                self.give_back()
            marker = yield from self.pass_on(self.tell, "[TOOL_CALLS]")

    def _list(self) -> Steps[bool]:
        try:
            objects = from_json((yield from self.brackets()))
            calls = [of_object(call) for call in objects]
        except ValueError:
            return False
        if not all(name and isinstance(arguments, dict) for name, arguments in calls):
            return False
        are_told = [self.call(*call, _id(item)) for call, item in zip(calls, objects, strict=True)]
        return any(are_told)

    def _named(self) -> Steps[bool]:
        name, marker = yield from self.until("[ARGS]", "[CALL_ID]", "\n", "{")
        call_id = None
        if marker == "[CALL_ID]":
            call_id, marker = yield from self.until("[ARGS]", "\n", "{")
        if marker != "[ARGS]":
            return False
        yield from self.space()
        self.call_begins(name.strip(), call_id)
        return self.call(name.strip(), (yield from self.json_arguments()), call_id)


def _id(call: dict[str, Any]) -> str | None:
    return call["id"] if isinstance(call.get("id"), str) else None
