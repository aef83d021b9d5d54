"""GLM 4.5 to 5: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`.

4.5 and 4.6 write each part on a line of its own. Values are plain text if strings, else JSON.
"""

from __future__ import annotations

from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps

_VALUE_ENDS = {"</arg_value>": ("<arg_key>", "</tool_call>"), "</tool_call>": ("<tool_call>", "")}


class Glm(Parser):
    separates_calls = True

    def read(self) -> Steps[None]:
        yield from self.think("<think>", "</think>")
        while True:
            self.keep((yield from self.pass_on(self.tell, "<tool_call>")))
            yield from self.space()
            name, marker = yield from self.until("<arg_key>", "</tool_call>", "\n", " ")
            if marker == "\n":
                yield from self.space()
                marker = yield from self.accept("<arg_key>", "</tool_call>")
            self.call_begins(name)
            if not self.call(name, (yield from self._arguments(name, marker))):
                self.give_back()

    def _arguments(self, name: str, marker: str) -> Steps[dict[str, Any] | None]:
        """All arguments of a call of this function, up to its end; None where there is none."""
        properties = (self.schemas.get(name) or {}).get("properties") or {}
        arguments: dict[str, Any] = {}
        while marker == "<arg_key>":
            key, _ = yield from self.until("</arg_key>")
            key = key.strip()
            yield from self.space()
            if not (yield from self.accept("<arg_value>")):
                return None
            arguments[key], marker = yield from self.argument(key, properties.get(key), _VALUE_ENDS)
            if marker == "</arg_value>":
                yield from self.space()
                marker = yield from self.accept("<arg_key>", "</tool_call>")
        return arguments if marker == "</tool_call>" else None
