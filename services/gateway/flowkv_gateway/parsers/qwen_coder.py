"""Qwen3-Coder and Qwen 3.5 on: calls as tags, with each parameter's value as plain text on lines of its own.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

These models leave out `<tool_call>`, `</parameter>` and, before a call, `</think>`: all of that is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps

# A value may have any of these tags in it, so what follows them counts.
_AFTER_VALUE = ("<parameter=", "</function>", "</tool_call>")
_AFTER_CALL = ("</tool_call>", "<tool_call>", "")
_VALUE_ENDS = {
    "\n</parameter>": _AFTER_VALUE,
    "</parameter>": _AFTER_VALUE,
    "\n<parameter=": (),
    "\n</function>": _AFTER_CALL,
    "</function>": _AFTER_CALL,
}


class QwenCoder(Parser):
    separates_calls = True

    def read(self) -> Steps[None]:
        if (yield from self.reasoning_begins("<think>")):
            tell = self.tell_reasoning
            while (marker := (yield from self.pass_on(tell, "</think>", "<tool_call>"))) == "<tool_call>":
                if (yield from self._tool_call(marker, tell)):
                    break
            self.reasoning_is_over()
        elif self.prompt.endswith("</think>"):
            self.reasoning_is_over()
        while True:
            marker = yield from self.pass_on(self.tell, "<tool_call>", "<function=")
            yield from self._tool_call(marker, self.tell)

    def _tool_call(self, marker: str, tell: Callable[[str], None]) -> Steps[bool]:
        """What follows the marker: a call, or else `tell` tells it."""
        self.keep(marker)
        if marker == "<tool_call>":
            yield from self.space()
            if not (yield from self.accept("<function=")):
                self.give_back(tell)
                return False
        name, end = yield from self.until(">", "\n")
        # Without `<tool_call>`, the name of a tool that is offered tells a call from text about calls.
        is_call = end == ">" and (marker == "<tool_call>" or name in self.schemas)
        if is_call:
            self.call_begins(name)
        if not is_call or not self.call(name, (yield from self._parameters(name))):
            self.give_back(tell)
            return False
        yield from self.space()
        yield from self.accept("</tool_call>")
        return True

    def _parameters(self, name: str) -> Steps[dict[str, Any] | None]:
        """All parameters of a call of this function, up to its end; None where there is none."""
        properties = (self.schemas.get(name) or {}).get("properties") or {}
        arguments: dict[str, Any] = {}
        yield from self.space()
        marker = yield from self.accept(*_AFTER_VALUE)
        while marker.endswith("<parameter="):
            key, _ = yield from self.until(">")
            yield from self.accept("\n")
            arguments[key], marker = yield from self.argument(key, properties.get(key), _VALUE_ENDS)
            if marker.endswith("</parameter>"):
                yield from self.space()
                marker = yield from self.accept(*_AFTER_VALUE)
        return arguments if marker else None
