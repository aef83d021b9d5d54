"""Tokens to what the client reads: text, stop strings, and what is sent of an answer, whole or as a stream.

Linear in the output, and no character is ever cut in two.
"""

from __future__ import annotations

import codecs
import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from flowkv_common.errors import FlowKVError
from flowkv_common.wire.messages import TokenChunk, TokenLogprob
from flowkv_gateway.echo import ToldPrompt
from flowkv_gateway.errors import error_body
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Reasoning
from flowkv_gateway.reader import AnswerReader
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.schemas import ChoicesRequest, StreamOptions
from flowkv_gateway.tokenizer import Vocabulary

Json = dict[str, Any]

_LEAST_LOGPROB = -9999.0  # what OpenAI shows for minus infinity, which JSON can't


class PreparedStop(NamedTuple):
    """One stop string, prepared for being looked for. All choices of a request share it.

    `borders`: per prefix, how long its longest proper prefix is that is also its suffix (Knuth-Morris-Pratt).
    `sees_hidden`: it has a special token's text in it, so it is looked for in the text with special tokens.
    """

    text: str
    borders: Sequence[int]
    sees_hidden: bool


def prepare_stops(stops: Iterable[str], special_texts: Collection[str] = ()) -> tuple[PreparedStop, ...]:
    """Takes time linear in the length of each stop string, and per special token of the model."""
    prepared = []
    for stop in stops:
        borders, length = [0] * len(stop), 0
        for place in range(1, len(stop)):
            while length and stop[place] != stop[length]:
                length = borders[length - 1]
            if stop[place] == stop[length]:
                length += 1
            borders[place] = length
        prepared.append(PreparedStop(stop, borders, any(special in stop for special in special_texts)))
    return tuple(prepared)


class StopFinder:
    """Passes text on until a stop string ends in it; the stop string itself only if `keeps_stop`.

    Of two stop strings the one that ends first counts, and of two that end at the same place the longer.
    Text that may be the beginning of a stop string is held back. Takes time linear in the text.

    Special tokens are not shown, and most stop strings don't see them: text on both sides of one is as if it
    stood together. A stop string with a special token's text in it sees them.
    """

    def __init__(self, stops: Sequence[PreparedStop], *, keeps_stop: bool = False) -> None:
        self._stops = stops
        self._keeps_stop = keeps_stop
        self._matched = [0] * len(stops)  # per stop string: how much of it the text it sees ends with
        self._held = ""  # shown text only
        # How many shown characters there were after each of the latest ones, hidden ones among them: as far
        # back as a stop string can begin that sees these.
        self._longest_seeing = max((len(stop.text) for stop in stops if stop.sees_hidden), default=0)
        self._num_shown = deque([0], maxlen=self._longest_seeing + 1)
        self.found: str | None = None  # the stop string that it has stopped at

    def push(self, text: str, *, is_shown: bool = True) -> str:
        """The text that is now safe to show. After a stop string was found there is none."""
        if self.found is not None or not (is_shown or self._longest_seeing):
            return ""
        if not self._stops:
            return text
        for place, char in enumerate(text, start=1):
            self._num_shown.append(self._num_shown[-1] + is_shown)
            if ended := self._advance(char, is_shown):
                self.found = max((self._stops[which].text for which in ended), key=len)
                self._held += text[:place] if is_shown else ""
                return self._take_before(ended)
        self._held += text if is_shown else ""
        return self._take_before(range(len(self._stops)))

    def finish(self) -> str:
        """The text held back, once nothing more can come."""
        return self._held if self.found is None else ""

    def _advance(self, char: str, is_shown: bool) -> list[int]:
        """Take one character in; the stop strings that end with it."""
        ended = []
        for which, (stop, borders, sees_hidden) in enumerate(self._stops):
            if not is_shown and not sees_hidden:
                continue
            matched = self._matched[which]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[which] = matched
            if matched == len(stop):
                ended.append(which)
        return ended

    def _take_before(self, stops: Iterable[int]) -> str:
        """The held text before the longest match of these stop strings; all of it if they may be shown."""
        length = len(self._held)
        for which in stops if not self._keeps_stop else ():
            matched = self._matched[which]
            if self._stops[which].sees_hidden:  # count its shown characters alone
                matched = self._num_shown[-1] - self._num_shown[-1 - matched]
            length = min(length, len(self._held) - matched)
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class Delta(NamedTuple):
    """What one token adds to the choice with this number.

    `text` is empty for half a character, or while it may be the beginning of a stop string. `text_offset` is
    where the token's own text begins in the answer. `logprob` is None if not asked for, `token_id` only in a
    last delta without a token. `events` is what a reader found in the text; None without one: all is content.
    `stopped_by` is the stop string, or the one of the request's `stop_token_ids`, that ended the answer.
    """

    choice: int
    text: str
    is_first: bool
    finish_reason: str | None
    logprob: TokenLogprob | None
    text_offset: int
    token_id: int | None
    events: Sequence[Event] | None = None
    stopped_by: str | int | None = None
    prompt: ToldPrompt | None = None  # of the first delta, if anything is told of it

    def told(self) -> Sequence[Event]:
        """Its events; without a reader the text is one, if there is any."""
        if self.events is not None:
            return self.events
        return (Content(self.text),) if self.text else ()


@dataclass(frozen=True)
class Display:
    """What of an answer its client sees.

    `stop_ids` are the tokens at which nodes end it: the model's own and the request's. Neither they nor stop
    strings are shown, nor are special tokens, unless the request wants them.
    """

    stops: Sequence[PreparedStop] = ()
    stop_ids: frozenset[int] = frozenset()
    shows_stop: bool = False
    shows_special: bool = False
    shows_output: bool = True


class Choice:
    """One answer as text. Stop strings count only after `min_tokens` tokens.

    A `reader` finds calls and reasoning in it. It sees the special tokens, and so do all stop strings then.
    """

    def __init__(
        self,
        index: int,
        request: RequestState,
        vocabulary: Vocabulary,
        display: Display,
        reader: AnswerReader | None = None,
        prompt: ToldPrompt | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._vocabulary = vocabulary
        self._display = display
        self._reader = reader
        self._shows_special = display.shows_special or reader is not None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopFinder(display.stops, keeps_stop=display.shows_stop)
        self._prompt = prompt
        self._num_chars = len(prompt.text) if prompt else 0  # so far, held back text included

    @property
    def num_reasoning_tokens(self) -> int | None:
        """None if reasoning is not told from the rest."""
        return self._reader.num_reasoning_tokens if self._reader else None

    def push(self, chunk: TokenChunk) -> Iterator[Delta]:
        """One delta per token, none after a stop string; a last chunk without tokens gives one, too."""
        token_ids: Sequence[int | None] = chunk.token_ids or (None,)
        display = self._display
        if not display.shows_output:
            self.finish_reason = "length"
            yield Delta(self.index, "", True, "length", None, self._num_chars, None, prompt=self._prompt)
            return
        for place, token_id in enumerate(token_ids, start=1):
            reason = chunk.finish_reason if place == len(token_ids) else None
            offset, is_first = self._num_chars, self.num_tokens == 0
            text = hidden = ""
            if token_id is not None:
                self.num_tokens += 1
                has_ended_it = reason == "stop" and token_id in display.stop_ids
                is_special = token_id in self._vocabulary.special_ids
                if (has_ended_it and not display.shows_stop) or (is_special and not self._shows_special):
                    hidden = self._vocabulary.token_text(token_id)
                else:
                    text = self._utf8.decode(self._vocabulary.token_bytes(token_id))
            if reason is not None:
                text += self._utf8.decode(b"", final=True)
            self._num_chars += len(text)
            if self.num_tokens > self.request.sampling.min_tokens:
                text = self._stops.push(hidden, is_shown=False) + self._stops.push(text)
            stopped_by: str | int | None = self._stops.found
            if stopped_by is not None:
                reason = "stop"
            elif reason is not None:
                text += self._stops.finish()
                if reason == "stop" and token_id in self.request.sampling.stop_token_ids:
                    stopped_by = token_id
            self.finish_reason = reason
            logprob = chunk.logprobs[place - 1] if chunk.logprobs else None
            delta = Delta(self.index, text, is_first, reason, logprob, offset, token_id, None, stopped_by)
            if is_first and self._prompt is not None:
                delta = delta._replace(prompt=self._prompt)
            yield self._read(self._reader, delta) if self._reader else delta
            if self.finish_reason is not None:
                return

    def _read(self, reader: AnswerReader, delta: Delta) -> Delta:
        """The delta with its events, and with what only the reader knows of the end."""
        special = ""
        if delta.token_id is not None and delta.token_id in self._vocabulary.special_ids:
            special = self._vocabulary.token_text(delta.token_id)
        events = reader.push(delta.text, special=special, is_last=self.finish_reason is not None)
        if reader.is_over:
            self.finish_reason = "stop"
        has_called = self.finish_reason == "stop" and reader.has_calls
        reason = "tool_calls" if has_called else self.finish_reason
        return delta._replace(finish_reason=reason, events=events)


# --- what is sent -----------------------------------------------------------------------------------


def system_fingerprint(model_fingerprint: str, version: str) -> str:
    """Changes whenever the same request with the same seed may be answered with another text."""
    return "fp_" + hashlib.sha256(f"{model_fingerprint} {version}".encode()).hexdigest()[:12]


class Usage(NamedTuple):
    """Tokens of a request so far. A prompt counts once, however many choices it has.

    `num_cached` are of the prompts, `num_reasoning` of the output; None if it is not told from the rest.
    """

    num_prompt: int
    num_cached: int
    num_output: int
    num_reasoning: int | None


GetUsage = Callable[[], Usage]


class ReplyWriter(ABC):
    """Encodes all that is sent for one request to one endpoint: one JSON body, or the events of a stream.

    A stream is `opening`, `delta` for each token, and `closing`, or `failure` wherever it breaks off. Each is
    bytes of any number of events.
    """

    id_prefix: str
    ping = b": ping\n\n"  # a comment: what fills a silence

    def __init__(self) -> None:
        self.reply_id = f"{self.id_prefix}{secrets.token_hex(12)}"

    @abstractmethod
    def whole(self, choices: Iterable[Sequence[Delta]], usage: Usage) -> bytes:
        """All deltas of each choice as one response."""

    def opening(self, usage: GetUsage) -> bytes:
        """What goes out with the stream's headers, which may be before the first token."""
        return b""

    @abstractmethod
    def delta(self, delta: Delta, usage: GetUsage) -> bytes: ...

    @abstractmethod
    def closing(self, usage: GetUsage) -> bytes: ...

    @abstractmethod
    def failure(self, error: FlowKVError) -> bytes:
        """What ends a stream that has begun. Before, an error is a response of its own."""


def named_event(event: Json) -> bytes:
    """An event of a stream whose name is its type."""
    name: str = event["type"]
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class OpenAIWriter(ReplyWriter):
    """What `/v1/chat/completions` and `/v1/completions` have in common."""

    object: str
    chunk_object: str

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: str,
        request: ChoicesRequest,
        system_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._head: Json = {
            "id": self.reply_id,
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": system_fingerprint,
        }
        if request.service_tier is not None:
            self._head["service_tier"] = "default"
        self._shows_token_ids = request.return_token_ids or False
        options = request.stream_options or StreamOptions()
        self._ends_with_usage = options.include_usage
        self._has_usage_each = options.continuous_usage_stats
        self._usage_field: Json = {"usage": None} if options.include_usage else {}

    def whole(self, choices: Iterable[Sequence[Delta]], usage: Usage) -> bytes:
        choices = list(choices)
        shown = [self.choice(deltas, is_chunk=False) for deltas in choices]
        about_prompt = self._about_prompt(choices[0][0])
        return self._encode(self.object, shown, {**about_prompt, "usage": _openai_usage(usage)})

    def delta(self, delta: Delta, usage: GetUsage) -> bytes:
        shown = {"usage": _openai_usage(usage())} if self._has_usage_each else self._usage_field
        choice = self.choice((delta,), is_chunk=True)
        return b"data: " + self._encode(self.chunk_object, [choice], shown) + b"\n\n"

    def closing(self, usage: GetUsage) -> bytes:
        last = b"data: [DONE]\n\n"
        if not self._ends_with_usage:
            return last
        chunk = self._encode(self.chunk_object, [], {"usage": _openai_usage(usage())})
        return b"data: " + chunk + b"\n\n" + last

    def failure(self, error: FlowKVError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def choice(self, deltas: Sequence[Delta], *, is_chunk: bool) -> Json:
        """Deltas of one choice, put together: all of them, or one as a chunk."""
        first, last = deltas[0], deltas[-1]
        has_logprobs = first.logprob is not None or (first.prompt and first.prompt.echoes_logprobs)
        choice = {
            "index": last.choice,
            **self._content(deltas, is_chunk),
            "logprobs": self._logprobs(deltas) if has_logprobs else None,
            "finish_reason": last.finish_reason,
        }
        if last.finish_reason is not None:
            choice["stop_reason"] = last.stopped_by
        if self._shows_token_ids:
            choice["token_ids"] = [delta.token_id for delta in deltas if delta.token_id is not None]
        return choice

    @abstractmethod
    def _content(self, deltas: Sequence[Delta], is_chunk: bool) -> Json: ...

    @abstractmethod
    def _logprobs(self, deltas: Sequence[Delta]) -> Json: ...

    def _about_prompt(self, first: Delta) -> Json:
        """What the whole answer tells of it, beside its choices."""
        return {}

    def _ranked(self, prompt: ToldPrompt) -> list[Json | None]:
        """vLLM's form: of each token itself and the best ones, by their ids."""
        ranked: list[Json | None] = [None]
        for entry in prompt.ranked():
            own = (entry.token_id, entry.logprob, entry.rank)
            best = [(token_id, value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)]
            ranked.append(
                {
                    str(token_id): {
                        "logprob": _finite(value),
                        "rank": rank,
                        "decoded_token": self._vocabulary.token_text(token_id),
                    }
                    for token_id, value, rank in (own, *best)
                }
            )
        return ranked

    def _encode(self, kind: str, choices: list[Json], usage: Json) -> bytes:
        """`usage` is the field of that name if there is one, else empty."""
        return msgspec.json.encode({**self._head, "object": kind, "choices": choices, **usage})


def _openai_usage(usage: Usage) -> Json:
    shown: Json = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
    }
    if usage.num_reasoning is not None:
        shown["completion_tokens_details"] = {"reasoning_tokens": usage.num_reasoning}
    return shown


class ChatWriter(OpenAIWriter):
    """`/v1/chat/completions`. The role goes out with the first token: earlier, it would look like one."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _content(self, deltas: Sequence[Delta], is_chunk: bool) -> Json:
        first = deltas[0]
        if first.events is not None:
            found = _told(event for delta in deltas for event in delta.events or ())
        elif is_chunk:
            found = {"content": first.text}
        else:
            found = {"content": "".join([delta.text for delta in deltas])}
        if not is_chunk:
            # A message has a content, if only null, and its calls have no `index`.
            content = None if "tool_calls" in found else ""
            for call in found.get("tool_calls", ()):
                del call["index"]
            return {"message": {"role": "assistant", "content": content, "refusal": None, **found}}
        return {"delta": {**found, "role": "assistant"} if first.is_first else found}

    def _about_prompt(self, first: Delta) -> Json:
        return {"prompt_logprobs": self._ranked(first.prompt)} if first.prompt else {}

    def _logprobs(self, deltas: Sequence[Delta]) -> Json:
        logprobs = [delta.logprob for delta in deltas if delta.logprob is not None]
        content = [token_logprob(self._vocabulary, logprob) for logprob in logprobs]
        return {"content": content, "refusal": None}


def token_logprob(vocabulary: Vocabulary, logprob: TokenLogprob) -> Json:
    """A token and the likeliest ones in its place, as OpenAI's chats and responses show them."""

    def token(token_id: int, value: float) -> Json:
        return {
            "token": vocabulary.token_text(token_id),
            "logprob": _finite(value),
            "bytes": list(vocabulary.token_bytes(token_id)),
        }

    top = [token(token_id, value) for token_id, value in logprob.top]
    return {**token(logprob.token_id, logprob.logprob), "top_logprobs": top}


def _told(events: Iterable[Event]) -> Json:
    """Events put together as OpenAI writes them; reasoning by both names that clients look for."""
    texts: dict[type[Event], list[str]] = {}
    calls: dict[int, Json] = {}
    for event in events:
        if isinstance(event, CallBegins):
            call_id = event.id or f"call_{secrets.token_hex(12)}"
            function = {"name": event.name, "arguments": ""}
            calls[event.call] = {"id": call_id, "type": "function", "function": function}
        elif isinstance(event, Arguments):
            call = calls.setdefault(event.call, {"function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
        else:
            texts.setdefault(type(event), []).append(event.text)
    told: Json = {}
    if Reasoning in texts:
        told["reasoning_content"] = told["reasoning"] = "".join(texts[Reasoning])
    if Content in texts:
        told["content"] = "".join(texts[Content])
    if calls:
        told["tool_calls"] = [{"index": index, **call} for index, call in calls.items()]
    return told


class TextWriter(OpenAIWriter):
    """`/v1/completions`. Whole answers and chunks look the same."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def _content(self, deltas: Sequence[Delta], is_chunk: bool) -> Json:
        text = "".join([delta.text for delta in deltas])
        if (prompt := deltas[0].prompt) is None:
            return {"text": text}
        ranked = {} if prompt.num_ranked is None else {"prompt_logprobs": self._ranked(prompt)}
        return {"text": prompt.text + text, **ranked}

    def _logprobs(self, deltas: Sequence[Delta]) -> Json:
        offsets = [delta.text_offset for delta in deltas if delta.logprob is not None]
        logprobs = [delta.logprob for delta in deltas if delta.logprob is not None]
        shown = self._columns(logprobs, offsets)
        if (prompt := deltas[0].prompt) is None or not prompt.echoes_logprobs:
            return shown
        first, *offsets = prompt.text_offsets
        token = self._vocabulary.token_text(prompt.request.prompt_ids[0])
        begin = {"tokens": token, "token_logprobs": None, "top_logprobs": None, "text_offset": first}
        echoed = self._columns(prompt.echoed(), offsets)
        return {name: [begin[name], *echoed[name], *values] for name, values in shown.items()}

    def _columns(self, logprobs: Sequence[TokenLogprob], offsets: list[int]) -> Json:
        return {
            "tokens": [self._vocabulary.token_text(logprob.token_id) for logprob in logprobs],
            "token_logprobs": [_finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [self._top(logprob) for logprob in logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Of the best tokens and the chosen one, by their texts.

        Where several have one text, it means the chosen token, else the best of them. The others are called
        by their ids, so that none is lost.
        """
        values = dict([*logprob.top, (logprob.token_id, logprob.logprob)])
        ids_of: dict[str, int] = {}
        for token_id in (logprob.token_id, *values):
            ids_of.setdefault(self._vocabulary.token_text(token_id), token_id)
        texts = {token_id: text for text, token_id in ids_of.items()}
        return {
            texts.get(token_id, f"token_id:{token_id}"): _finite(value) for token_id, value in values.items()
        }


def _finite(logprob: float) -> float:
    """In this order of arguments, `max` turns NaN into the least as well."""
    return max(_LEAST_LOGPROB, logprob)
