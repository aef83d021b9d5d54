"""Models without tools that write `<think>...</think>` before their answer."""

from __future__ import annotations

from flowkv_gateway.parsers.reading import Parser, Steps


class Thinking(Parser):
    def read(self) -> Steps[None]:
        yield from self.think("<think>", "</think>")
        while True:
            self.tell((yield from self.pass_on(self.tell, "</think>")))
