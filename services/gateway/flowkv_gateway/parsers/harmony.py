"""GPT-OSS: messages with a header each, `<|start|>role to=recipient<|channel|>channel<|message|>text<|end|>`.

The recipient stands after the role or the channel. The channel `analysis` is reasoning, a message to
`functions.name` a call, all other text content.
"""

from __future__ import annotations

import re

from flowkv_gateway.parsers.reading import Parser, Steps

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
# A model may write about these tokens, too, so what follows them counts.
_ENDS = dict.fromkeys(("<|end|>", "<|call|>", "<|return|>"), (_START, _CHANNEL, "")) | {_START: ()}
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNELS = re.compile(r"<\|channel\|>\s*(\w+)")


class Harmony(Parser):
    def read(self) -> Steps[None]:
        # The prompt ends in `<|start|>assistant`, so the answer begins within a header.
        header = yield from self.space()
        if not (yield from self.next_is(_CHANNEL, _CONSTRAIN, _MESSAGE, _START, "to=")):
            self.tell(header)
            yield from self.pass_on(self.tell, _START)
        marker = _START
        while True:
            self.keep(marker)
            header, end = yield from self.until(_MESSAGE, *_ENDS)
            if end == _MESSAGE:
                self.forget()
                marker = yield from self._message(marker + header)
            else:
                self.give_back(self.leave)
                marker = end
            if marker != _START:
                marker = yield from self.pass_on(self.leave, _START, _CHANNEL)

    def _message(self, header: str) -> Steps[str]:
        """The text after such a header; the marker that ends it."""
        recipients, channels = _RECIPIENT.findall(header), _CHANNELS.findall(header)
        recipient = recipients[-1] if recipients and recipients[-1] != "assistant" else ""
        name = recipient.removeprefix("functions.")
        if name != recipient or name in self.schemas:
            self.keep("")
            yield from self.space()
            self.call_begins(name)
            if not self.call(name, (yield from self.json_arguments())):
                self.give_back()
            return (yield from self.pass_on_to(self.tell, _ENDS))
        if recipient:  # a tool of OpenAI's own, which nobody offered
            return (yield from self.pass_on_to(self.leave, _ENDS))
        if channels and channels[-1] == "analysis":
            marker = yield from self.pass_on_to(self.tell_reasoning, _ENDS)
            self.reasoning_is_over()
            return marker
        return (yield from self.pass_on_to(self.tell, _ENDS))
