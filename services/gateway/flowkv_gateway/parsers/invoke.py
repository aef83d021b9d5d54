"""DeepSeek V3.2 to V4.1 and MiniMax M2: sections of `<invoke name="...">` with `<parameter name="...">`.

DeepSeek's tags begin with a special token, and say whether a value is a string. What MiniMax's values are,
their schemas say.
"""

from __future__ import annotations

from typing import Any

from flowkv_gateway.parsers.reading import Parser, Steps

# What DeepSeek's attribute says of a value; if it is no string, it is JSON of any type.
_SCHEMAS = {'string="true"': {"type": "string"}, 'string="false"': {}}


class Invoke(Parser):
    separates_calls = True
    sections: dict[str, str]  # each form's opening tag, and what stands before the names of the tags within

    def read(self) -> Steps[None]:
        yield from self.think("<think>", "</think>")
        while True:
            section = yield from self.pass_on(self.tell, *self.sections)
            tag = self.sections[section]
            end, invoke = section.replace("<", "</"), f'<{tag}invoke name="'
            while (marker := (yield from self.between_calls(invoke, end))) == invoke:
                self.keep(marker)
                name, _ = yield from self.until('"')
                self.call_begins(name)
                if not self.call(name, (yield from self._parameters(name, tag))):
                    self.give_back()

    def _parameters(self, name: str, tag: str) -> Steps[dict[str, Any] | None]:
        """All parameters of a call of this function, up to its end; None where there is none."""
        properties = (self.schemas.get(name) or {}).get("properties") or {}
        parameter, parameter_end = f'<{tag}parameter name="', f"</{tag}parameter>"
        invoke_end = f"</{tag}invoke>"
        arguments: dict[str, Any] = {}
        yield from self.space()
        if (yield from self.accept("/>")):
            return arguments
        marker = yield from self.accept(">")
        while marker:
            yield from self.space()
            if (marker := (yield from self.accept(parameter, invoke_end))) == invoke_end:
                return arguments
            if marker:
                key, _ = yield from self.until('"')
                attributes, _ = yield from self.until(">")
                schema = _SCHEMAS.get(attributes.strip(), properties.get(key))
                ends = {parameter_end: (parameter, invoke_end)}
                arguments[key], _ = yield from self.argument(key, schema, ends)
        return None


class Dsml(Invoke):
    sections = {
        "<｜DSML｜function_calls>": "｜DSML｜",
        "<｜DSML｜tool_calls>": "｜DSML｜",
        "<｜DSML｜ calls>": "｜DSML｜ ",
    }


class MiniMax(Invoke):
    sections = {"<minimax:tool_call>": ""}
