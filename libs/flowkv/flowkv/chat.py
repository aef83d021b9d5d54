"""Talk to a model: streamed, with markdown and history.

  flowkv chat                          with the `flowkv up` of this folder
  flowkv chat "Why is the sky blue?"   one question, then the end
  flowkv chat --url http://host:8000   with any OpenAI server

/system TEXT sets the system prompt, /stats tells times and nodes of the last answer, /clear begins anew,
/help lists these, Ctrl-C ends an answer, Ctrl-D the chat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowkv.api import add_api_options, asked, find_url, first_model, raise_for_status
from flowkv.terminal import connected, console, make_parser
from flowkv_common.errors import FlowKVError, Internal

HISTORY = Path("~/.cache/flowkv/chat_history").expanduser()
MAX_HISTORY = 1000
# Markdown is laid out anew each time.
DRAW_PERIOD_S = 0.1


class Chat:
    """One conversation with the API at `url`. `messages` are what the model sees next."""

    def __init__(self, url: str, model: str, options: argparse.Namespace) -> None:
        self.messages: list[dict[str, str]] = []
        self._url = url
        self._model = model
        self._options = options
        self._last: Answer | None = None
        if options.system:
            self.set_system(options.system)

    def set_system(self, text: str) -> None:
        self.messages = [one for one in self.messages if one["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def say(self, line: str) -> None:
        """A line that the user has typed: a command, or the next message."""
        command, _, rest = line.partition(" ")
        match command:
            case "/system":
                self.set_system(rest.strip())
            case "/clear":
                self.messages = [one for one in self.messages if one["role"] == "system"]
            case "/stats":
                self.show_stats()
            case "/help":
                print((__doc__ or "").split("\n\n")[-1].strip())
            case _ if line.startswith("/"):
                print(f"there is no {command}: /help lists what there is")
            case _:
                self.ask(line)

    def ask(self, text: str) -> None:
        """Show the answer as it comes, and keep it. Raises FlowKVError, and forgets the question then."""
        self.messages.append({"role": "user", "content": text})
        answer = self._last = Answer()
        try:
            with contextlib.suppress(KeyboardInterrupt), _shown() as show:  # what has come by then is kept
                for text_so_far in answer.read(self._url, self._body(), self._options.key):
                    show(text_so_far)
        except FlowKVError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})

    def _body(self) -> dict[str, Any]:
        body = {"model": self._model, "messages": self.messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        limits = {"temperature": self._options.temperature, "max_tokens": self._options.max_tokens}
        return {**body, **{name: value for name, value in limits.items() if value is not None}}

    def show_stats(self) -> None:
        """Of the last answer: its times as seen here, and as the bus tells where it ran."""
        if (answer := self._last) is None or answer.ttft_s is None:
            print("nothing has been answered yet")
            return
        print(answer.times())
        try:
            print(*asyncio.run(self._where(answer.id)), sep="\n")
        except FlowKVError as error:
            print(f"where it ran can't be told: {error}")

    async def _where(self, request_id: str) -> list[str]:
        from flowkv.trace import find_finished
        from flowkv_common.wire.messages import FindFinished

        async with connected(self._options) as bus:
            found = await find_finished(bus, FindFinished(request_id=request_id))
        return [
            f"prefill on {one.prefill_node}, decode on {one.decode_node}, {one.num_cached_tokens} tokens "
            f"cached; moment by moment: flowkv trace {request_id}"
            for one in found
        ]


class Answer:
    """One that is being streamed. Times are seconds since it was asked for."""

    def __init__(self) -> None:
        self.id = ""
        self.text = ""
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.ttft_s: float | None = None
        self.total_s = 0.0

    def read(self, url: str, body: dict[str, Any], key: str) -> Iterator[str]:
        """The text so far, each time that more has come. Raises FlowKVError."""
        began = time.monotonic()
        with asked(url, "/v1/chat/completions", body, key=key) as response:
            raise_for_status(response)
            for line in response:
                self.total_s = time.monotonic() - began
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if event.get("error"):
                    raise Internal(str(event["error"].get("message")))
                self._take(event)
                yield self.text

    def times(self) -> str:
        ttft_s = self.ttft_s or 0.0
        rest_s = self.total_s - ttft_s
        speed = (
            f", then {(self.num_tokens - 1) / rest_s:.1f} tokens/s" if self.num_tokens > 1 and rest_s else ""
        )
        return f"{self.num_prompt_tokens} + {self.num_tokens} tokens, TTFT {ttft_s:.3f} s{speed}"

    def _take(self, event: dict[str, Any]) -> None:
        self.id = event.get("id") or self.id
        if usage := event.get("usage"):
            self.num_prompt_tokens, self.num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content")
            if piece:
                self.ttft_s = self.total_s if self.ttft_s is None else self.ttft_s
                self.text += piece


@contextlib.contextmanager
def _shown() -> Iterator[Any]:
    """Gives a function that shows the text so far: as markdown in a terminal, else only what is new."""
    if not console().is_terminal:
        num_shown = 0

        def write(text: str) -> None:
            nonlocal num_shown
            sys.stdout.write(text[num_shown:])
            sys.stdout.flush()
            num_shown = len(text)

        try:
            yield write
        finally:
            print()
        return
    from rich.live import Live
    from rich.markdown import Markdown

    latest = ""
    with Live(console=console(), auto_refresh=False, vertical_overflow="visible") as live:
        drawn_at = 0.0

        def draw(text: str) -> None:
            nonlocal latest, drawn_at
            latest = text
            if time.monotonic() - drawn_at > DRAW_PERIOD_S:
                live.update(Markdown(text), refresh=True)
                drawn_at = time.monotonic()

        try:
            yield draw
        finally:
            live.update(Markdown(latest), refresh=True)


def main(argv: list[str]) -> int:
    parser = make_parser("chat", __doc__)
    parser.add_argument("message", nargs="?", help="one question, instead of a conversation")
    add_api_options(parser)
    parser.add_argument("--model", default="", help="the first that the API lists without")
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args(argv)
    url = asyncio.run(find_url(options))
    chat = Chat(url, options.model or first_model(url, options.key), options)
    if options.message:
        chat.ask(options.message)
        return 0
    print(f"{url}: /help lists commands, Ctrl-D ends", file=sys.stderr)
    for line in _lines():
        try:
            chat.say(line)
        except FlowKVError as error:
            print(f"flowkv: {error}", file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """What the user types, until Ctrl-D; earlier lines by the arrow keys."""
    import readline

    HISTORY.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(MAX_HISTORY)
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # drops what was typed
                if line := input("> ").strip():
                    yield line
    except EOFError:
        print()
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(HISTORY)
