"""Kimi K2: calls in a section, between special tokens. A call's id has its name in it: `functions.name:0`."""

from __future__ import annotations

from flowkv_gateway.parsers.reading import Parser, Steps

_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class Kimi(Parser):
    def read(self) -> Steps[None]:
        marker = ""
        if (yield from self.reasoning_begins("<think>")):
            # These models may begin a call without an end to their reasoning.
            marker = yield from self.pass_on(self.tell_reasoning, "</think>", _BEGIN)
            self.reasoning_is_over()
        elif self.prompt.endswith("</think>"):
            self.reasoning_is_over()
        yield from self.call_sections(_BEGIN, _CALL, _END, self._call, marker)

    def _call(self) -> Steps[None]:
        self.keep(_CALL)
        call_id, marker = yield from self.until(_ARGUMENTS, _CALL_END)
        call_id = call_id.strip()
        if marker == _ARGUMENTS:
            yield from self.space()
            name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
            self.call_begins(name, call_id)
            if self.call(name, (yield from self.json_arguments()), call_id):
                yield from self.space()
                yield from self.accept(_CALL_END)
                return
            yield from self.until(_CALL_END)
        self.give_back()
