"""What all parsers share: they read text that comes in pieces as if all were there, and tell events.

A format is a generator that reads as one writes a parser of whole text by hand: up to a marker, a JSON value,
white space. It stops (`yield`) where the text so far doesn't decide, and goes on with the next piece. So a
split can't change what is found, and nothing is read twice: time is linear in the text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from flowkv_gateway.parsers.events import Arguments, CallBegins, Content, Event, Leftover, Reasoning
from flowkv_gateway.parsers.values import from_text, json_text, or_none, types_of

T = TypeVar("T")
Steps = Generator[None, None, T]

_SPACE = re.compile(r"\s*")
_IN_STRING = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
# Outside of strings: brackets, quotes, and all that neither JSON nor a Python literal can have.
_OUT_OF_STRING = re.compile(r"[\"'()\[\]{}]|[^\s\w:,.+=-]")
_CONTROL = re.compile(r"[\x00-\x1f]")
_CLOSING = {"{": "}", "[": "]", "(": ")"}


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: (json_text(found[0]) or "")[1:-1], text)


def _ignore(piece: str, num_open: int) -> None: ...


class _TextEnds(Exception):
    """Raised where a format wants more text than there will be."""


class Parser(ABC):
    """Reads one answer. `push` and `finish` return what each piece of it completed.

    `prompt` is the rendered prompt, or its end: it may have opened the reasoning. `tools` are the request's,
    as OpenAI writes them; without any, calls are content like all other text.

    A call comes out once it is whole and readable, so no client can run half of one. Text that looks like a
    call and isn't comes out as content. No text raises an exception.

    With `streams_calls`, a call's arguments come out as they are written, where the format's order of parts
    allows it. If it breaks off then, or can't be read, it stays without its end; the rest is left over.
    """

    # Does the template put white space between content and calls? Then it is no part of the content.
    separates_calls = False

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] = (), prompt: str = "", *, streams_calls: bool = False
    ) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self.schemas: dict[str, Any] = {
            function["name"]: function.get("parameters") for function in functions if "name" in function
        }
        self.prompt = prompt.rstrip()
        self._events: list[Event] = []
        self._streams_calls = streams_calls
        self._begun: CallBegins | None = None  # the call that is being read, if it is streamed
        self._has_begun = False  # was that told?
        self._arguments_end = ""  # what its arguments end with
        self._num_calls = 0
        self.has_called = False  # a whole call was told
        self._ahead = ""  # text that may not have been read yet
        self._place = 0  # where in it the next is to be read
        self._is_last = False
        self._kept: list[str] | None = None  # what was read since `keep`
        self._space: list[str] = []  # white space after content; what follows decides whether it is content
        self._is_after_call = False
        self._has_reasoned = False
        self._num_newlines = 0  # after reasoning: they are some of it only if more follows
        self._skips_newlines = False
        self._steps = self.read()

    def push(self, text: str) -> list[Event]:
        """The next piece of the answer, the texts of special tokens included."""
        self._ahead = self._ahead[self._place :] + text
        self._place = 0
        return self._go_on()

    def finish(self) -> list[Event]:
        """Nothing more comes. To be called once, last."""
        self._is_last = True
        return self._go_on()

    @abstractmethod
    def read(self) -> Steps[None]:
        """The format. Never returns: it reads until the text ends."""

    def _go_on(self) -> list[Event]:
        try:
            next(self._steps)
        except _TextEnds:
            unfinished = "".join(self._kept or ()) + self._ahead[self._place :]
            self._tell_space(before_call=bool(unfinished))
            if unfinished:
                self._events.append(Leftover(unfinished))
        events, self._events = self._events, []
        return events

    # --- reading ------------------------------------------------------------------------------------

    def pass_on(self, tell: Callable[[str], None], *markers: str) -> Steps[str]:
        """Tell the text before the next of these markers as it comes; the marker."""
        search, longest_start = _finder(markers)
        while not (found := search(self._ahead, self._place)):
            tell(self._take(len(self._ahead) - longest_start(self._ahead, self._place)))
            if self._is_last and self._kept is None:
                tell(self._take(len(self._ahead)))
            yield from self._wait()
        tell(self._take(found.start()))
        return self._take(found.end())

    def until(self, *markers: str) -> Steps[tuple[str, str]]:
        """The text before the next of these markers, and the marker. Only after `keep`."""
        pieces: list[str] = []
        marker = yield from self.pass_on(pieces.append, *markers)
        return "".join(pieces), marker

    def accept(self, *markers: str) -> Steps[str]:
        """The one of these markers that comes next, or none, and then nothing was read."""
        marker = yield from self.next_is(*markers)
        return self._take(self._place + len(marker))

    def next_is(self, *markers: str) -> Steps[str]:
        """As `accept`, but reads nothing. Where the text ends within a call, so does the parser's work."""
        longest = max(map(len, markers))
        while True:
            text = self._ahead[self._place : self._place + longest]
            for marker in markers:
                if text.startswith(marker):
                    return marker
            if not any(marker.startswith(text) for marker in markers):
                return ""
            if self._is_last and self._kept is None:
                return ""
            yield from self._wait()

    def space(self) -> Steps[str]:
        """All white space that comes next."""
        pieces = []
        while True:
            found = _SPACE.match(self._ahead, self._place)
            assert found is not None  # it matches nothing, too
            pieces.append(self._take(found.end()))
            if self._place < len(self._ahead) or self._is_last:
                return "".join(pieces)
            yield

    def is_at_end(self) -> Steps[bool]:
        """Does the text end here?"""
        while self._place == len(self._ahead) and not self._is_last:
            yield
        return self._place == len(self._ahead)

    def brackets(self, tell: Callable[[str, int], None] = _ignore, quotes: str = '"') -> Steps[str]:
        """A JSON object or array (with `quotes` for Python, a list), as far as brackets and strings tell.

        `tell` gets each piece and how many brackets are open after it. Line breaks in strings, which models
        write, are escaped for it. Nothing if none begins here, or if it breaks: then some of it was read.
        """
        if not (yield from self.next_is("{", "[")):
            return ""
        pieces: list[str] = []
        open_brackets: list[str] = []
        quote = ""
        while True:
            found = (_IN_STRING[quote] if quote else _OUT_OF_STRING).search(self._ahead, self._place)
            if found is None or (found.group() == "\\" and found.end() == len(self._ahead)):
                # What a backslash at the end escapes is still to come.
                pieces.append(self._take(found.start() if found else len(self._ahead)))
                tell(_escaped(pieces[-1]) if quote else pieces[-1], len(open_brackets))
                yield from self._wait()
                continue
            char, end, is_in_string = found.group(), found.end(), bool(quote)
            if char == "\\":
                if not quote:
                    return ""
                end += 1
            elif quote:
                quote = ""
            elif char in quotes:
                quote = char
            elif char in _CLOSING:
                open_brackets.append(char)
            elif not open_brackets or char != _CLOSING[open_brackets.pop()]:
                return ""
            pieces.append(self._take(end))
            tell(_escaped(pieces[-1]) if is_in_string else pieces[-1], len(open_brackets))
            if not open_brackets:
                return "".join(pieces)

    def pass_on_to(self, tell: Callable[[str], None], ends: Mapping[str, tuple[str, ...]]) -> Steps[str]:
        """Tell text that may have markers in it: it ends at the first with what may follow it; the marker.

        `ends`: what may follow each marker, after white space. `""` is the end of the text; after a marker
        with nothing given, anything may follow.
        """
        while True:
            marker = yield from self.pass_on(tell, *ends)
            if not (followers := ends[marker]):
                return marker
            space = yield from self.space()
            if "" in followers and (yield from self.is_at_end()):
                return marker
            if (yield from self.next_is(*filter(None, followers))):
                return marker
            tell(marker + space)

    def value(self, ends: Mapping[str, tuple[str, ...]]) -> Steps[tuple[str, str]]:
        """The same as one text, and the marker. Only after `keep`."""
        pieces: list[str] = []
        marker = yield from self.pass_on_to(pieces.append, ends)
        return "".join(pieces), marker

    def between_calls(self, *markers: str) -> Steps[str]:
        """The next of these markers. Text before it is no part of the answer; white space is nothing."""
        self.keep("")
        text, marker = yield from self.until(*markers)
        self.forget()
        self.leave(text if text.strip() else "")
        return marker

    def call_sections(
        self, begin: str, call: str, end: str, read_call: Callable[[], Steps[None]], marker: str = ""
    ) -> Steps[None]:
        """For ever: text up to `begin` or a first `call`, then calls up to `end`. `marker` was read last."""
        while True:
            if marker not in (begin, call):
                marker = yield from self.pass_on(self.tell, begin, call)
            while marker != end:
                if marker == call:
                    yield from read_call()
                marker = yield from self.between_calls(call, end)

    def argument(
        self, key: str, schema: object, ends: Mapping[str, tuple[str, ...]]
    ) -> Steps[tuple[Any, str]]:
        """The value of this argument, as plain text to one of the `ends` (see `pass_on_to`); and the end."""
        opening = (", " if self._arguments_end else "{") + (json_text(key) or "")
        if self._begun and set(types_of(schema)) == {"string"}:
            self.tell_arguments(f'{opening}: "', end="}")
            pieces: list[str] = []

            def tell(text: str) -> None:
                pieces.append(text)
                self.tell_arguments((json_text(text) or "")[1:-1], end="}")

            marker = yield from self.pass_on_to(tell, ends)
            self.tell_arguments('"', end="}")
            return "".join(pieces), marker
        text, marker = yield from self.value(ends)
        value = from_text(text, schema)
        self.tell_arguments(f"{opening}: {json_text(value)}", end="}")
        return value, marker

    def json_arguments(self) -> Steps[Any]:
        """All arguments, as a JSON object; None if there is none."""
        return or_none((yield from self.brackets(lambda text, _: self.tell_arguments(text))))

    def _wait(self) -> Steps[None]:
        if self._is_last:
            raise _TextEnds
        yield

    def _take(self, end: int) -> str:
        text = self._ahead[self._place : end]
        self._place = end
        if self._kept is not None:
            self._kept.append(text)
        return text

    # --- telling ------------------------------------------------------------------------------------

    def reasoning_begins(self, *markers: str) -> Steps[str]:
        """The marker that opens the reasoning, in the prompt or first in the answer; else nothing."""
        opened = next((marker for marker in markers if self.prompt.endswith(marker.rstrip())), "")
        self.tell((yield from self.space()))
        opened = (yield from self.accept(*markers)) or opened
        if opened:
            self._space.clear()
        return opened

    def reasoning_is_over(self) -> None:
        self._num_newlines = 0
        self._skips_newlines = True

    def think(self, begins: str, ends: str) -> Steps[None]:
        """The reasoning, if the answer begins with some."""
        if (yield from self.reasoning_begins(begins)):
            yield from self.pass_on(self.tell_reasoning, ends)
            self.reasoning_is_over()
        elif self.prompt.endswith(ends):
            self._skips_newlines = True

    def tell_reasoning(self, text: str) -> None:
        """Without the line breaks around it, which templates write."""
        if not self._has_reasoned:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if body:
            self._events.append(Reasoning("\n" * self._num_newlines + body))
            self._num_newlines = 0
            self._has_reasoned = True
        self._num_newlines += len(text) - len(body)

    def tell(self, text: str) -> None:
        """Content. The white space that it ends with waits for what follows."""
        if self._skips_newlines:
            text = text.lstrip("\n")
            self._skips_newlines = not text
        if body := text.rstrip():
            self._events.append(Content("".join((*self._space, body))))
            self._space.clear()
            self._is_after_call = False
        self._space.append(text[len(body) :])

    def keep(self, marker: str) -> None:
        """What is read from here on, this marker included, may turn out to be no call."""
        self._kept = [marker]

    def give_back(self, tell: Callable[[str], None] | None = None) -> None:
        """What was read since `keep` is no call: it is content, or what `tell` tells."""
        kept, self._kept = self._kept or [], None
        if self._has_begun:
            tell = self.leave
        self._call_is_over()
        (tell or self.tell)("".join(kept))

    def forget(self) -> None:
        """What was read since `keep` is read for good."""
        self._kept = None

    def leave(self, text: str) -> None:
        """Text that is no part of the answer."""
        if text:
            self._events.append(Leftover(text))

    def call_begins(self, name: str, id: str | None = None) -> None:
        """What follows are the arguments of such a call, if it is one."""
        if self._streams_calls and name and self.schemas:
            self._begun = CallBegins(self._num_calls, name, id)

    def tell_arguments(self, text: str, end: str = "") -> None:
        """A piece of the arguments of the call that began, and what they `end` with if it is the last."""
        if not self._begun or not text:
            return
        if not self._has_begun:
            self._has_begun = True
            self._tell_space(before_call=True)
            self._events.append(self._begun)
        self._events.append(Arguments(self._num_calls, text))
        self._arguments_end = end

    def call(self, name: str, arguments: object, id: str | None = None) -> bool:
        """Tell a call, or its end. False if it is none: no name, no object of arguments, no tools offered."""
        text = json_text(arguments) if isinstance(arguments, dict) else None
        if not (name and self.schemas) or text is None:
            return False
        self.forget()
        if not self._has_begun:
            self._begun = CallBegins(self._num_calls, name, id)
            self.tell_arguments(text)
        elif self._arguments_end:
            self.tell_arguments(self._arguments_end)
        self._call_is_over()
        self.has_called = True
        return True

    def _call_is_over(self) -> None:
        self._num_calls += self._has_begun
        self._is_after_call = self._is_after_call or self._has_begun
        self._begun, self._has_begun, self._arguments_end = None, False, ""

    def _tell_space(self, *, before_call: bool) -> None:
        space = "".join(self._space)
        self._space.clear()
        if space and not self._is_after_call and not (before_call and self.separates_calls):
            self._events.append(Content(space))


@cache
def _finder(
    markers: tuple[str, ...],
) -> tuple[Callable[[str, int], re.Match[str] | None], Callable[[str, int], int]]:
    """Finds the first of these markers, and how much of the text's end may be the beginning of one."""
    starts = {marker[:length] for marker in markers for length in range(1, len(marker))}
    longest = max(map(len, markers)) - 1
    pattern = re.compile("|".join(map(re.escape, markers)))

    def longest_start(text: str, place: int) -> int:
        for length in range(min(longest, len(text) - place), 0, -1):
            if text[-length:] in starts:
                return length
        return 0

    return pattern.search, longest_start
