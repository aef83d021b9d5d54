"""Reads an answer's text: what its client is told of it, in content, reasoning and calls."""

from __future__ import annotations

from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Leftover, Parser, Reasoning


class AnswerReader:
    """Reads one answer: its text in, what its client is told of it out.

    The text has the special tokens in it that the parser looks for. Those that it passes on as text are not
    shown, if they are among `special_texts`. Text that is no part of the answer is shown as content.
    """

    def __init__(
        self,
        parser: Parser,
        *,
        special_texts: frozenset[str] = frozenset(),
        shows_reasoning: bool = True,
        max_calls: int | None = None,
    ) -> None:
        self._parser = parser
        self._special_texts = special_texts
        self._seen: set[str] = set()  # special tokens in this answer: others' texts were written as text
        self._shows_reasoning = shows_reasoning
        self._max_calls = max_calls
        self._num_calls = 0
        self._num_undecided_tokens = 0
        self.num_reasoning_tokens = 0
        self.is_over = False  # there were as many calls as there may be

    @property
    def has_calls(self) -> bool:
        """Whole ones: a stream may have told the beginning of one that has broken off."""
        return self._parser.has_called

    def push(self, text: str, *, special: str = "", is_last: bool = False) -> list[Event]:
        """What is new with this token. `special`: its own text, if it is a special token."""
        if special in self._special_texts:
            self._seen.add(special)
        events = self._parser.push(text)
        if is_last:
            events += self._parser.finish()
        self._num_undecided_tokens += 1
        if events:
            if any(isinstance(event, Reasoning) for event in events):
                self.num_reasoning_tokens += self._num_undecided_tokens
            self._num_undecided_tokens = 0
        return [shown for event in events if (shown := self._shown(event)) is not None]

    def _shown(self, event: Event) -> Event | None:
        if self.is_over:
            return None
        if isinstance(event, CallBegins):
            if self._num_calls == self._max_calls:
                self.is_over = True
                return None
            self._num_calls += 1
            return event
        if isinstance(event, Arguments):
            return event
        if isinstance(event, Reasoning) and not self._shows_reasoning:
            return None
        text = event.text
        for special in self._seen:
            text = text.replace(special, "")
        if not text:
            return None
        return Content(text) if isinstance(event, Leftover) else event._replace(text=text)
