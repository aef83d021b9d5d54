"""DeepSeek V3, R1 and V3.1: calls in a section, between special tokens.

V3 and R1 write a call as `function<｜tool▁sep｜>name`, a line break and the arguments as a block of JSON,
V3.1 as `name<｜tool▁sep｜>{...}`.
"""

from __future__ import annotations

from flowkv_gateway.parsers.reading import Parser, Steps

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeek(Parser):
    def read(self) -> Steps[None]:
        yield from self.think("<think>", "</think>")
        yield from self.call_sections(_BEGIN, _CALL, _END, self._call)

    def _call(self) -> Steps[None]:
        self.keep(_CALL)
        name, marker = yield from self.until(_SEP, _CALL_END)
        if marker == _SEP:
            yield from self.space()
            if not (yield from self.next_is("{")):
                name, marker = yield from self.until("\n", _CALL_END)
                yield from self.accept("```json")
                yield from self.space()
            self.call_begins(name.strip())
            if self.call(name.strip(), (yield from self.json_arguments())):
                yield from self.space()
                yield from self.accept("```")
                yield from self.space()
                yield from self.accept(_CALL_END)
                return
        if marker != _CALL_END:
            yield from self.until(_CALL_END)
        self.give_back()
