"""Kimi K3: elements between special tokens, `<|open|>name<|sep|>...<|close|>name<|sep|>`.

A message has the elements `think`, `response` and `tools`; the latter has a `call` for each call, with an
`argument` of a type and a key for each argument, or all of them in one element `json`.
"""

from __future__ import annotations

import html
import re
from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps
from flowkv_gateway.parsers.values import or_none

_THINK, _RESPONSE, _TOOLS = "<|open|>think<|sep|>", "<|open|>response<|sep|>", "<|open|>tools<|sep|>"
_CALL, _ARGUMENT = "<|open|>call ", "<|open|>argument "
_CALL_END, _ARGUMENT_END = "<|close|>call<|sep|>", "<|close|>argument<|sep|>"
_JSON, _JSON_END = "<|open|>json ", "<|close|>json<|sep|>"
_CLOSE = tuple(f"<|close|>{name}<|sep|>" for name in ("think", "response", "tools", "message"))
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class KimiK3(Parser):
    def read(self) -> Steps[None]:
        tell = self.tell_reasoning if self.prompt.endswith(_THINK) else self.tell
        while True:
            marker = yield from self.pass_on(tell, _THINK, _RESPONSE, _TOOLS, *_CLOSE)
            if marker == _TOOLS:
                yield from self._calls()
            tell = self.tell_reasoning if marker == _THINK else self.tell

    def _calls(self) -> Steps[None]:
        while (marker := (yield from self.between_calls(_CALL, *_CLOSE))) == _CALL:
            self.keep(marker)
            attributes, _ = yield from self.until("<|sep|>")
            name = _attributes(attributes).get("tool", "")
            self.call_begins(name)
            if not self.call(name, (yield from self._arguments())):
                self.give_back()

    def _arguments(self) -> Steps[object]:
        """All arguments of a call, up to its end; None where there is none."""
        if (yield from self.accept(_JSON)):
            yield from self.until("<|sep|>")
            text, _ = yield from self.value({_JSON_END: (_CALL_END,)})
            yield from self.accept(_CALL_END)
            return or_none(text)
        arguments: dict[str, Any] = {}
        while (marker := (yield from self.accept(_ARGUMENT, _CALL_END))) == _ARGUMENT:
            text, _ = yield from self.until("<|sep|>")
            attributes = _attributes(text)
            key, schema = attributes.get("key", ""), {"type": attributes.get("type")}
            ends = {_ARGUMENT_END: (_ARGUMENT, _CALL_END)}
            arguments[key], _ = yield from self.argument(key, schema, ends)
        return arguments if marker else None


def _attributes(text: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(text)}
