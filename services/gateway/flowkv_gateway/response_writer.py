"""An answer as OpenAI's Responses show it: items, whole or as events that add, fill and complete them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from flowkv_common.errors import FlowKVError
from flowkv_gateway.errors import status_of
from flowkv_gateway.output import Delta, GetUsage, Json, ReplyWriter, Usage, named_event, token_logprob
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Reasoning
from flowkv_gateway.responses import flat_name
from flowkv_gateway.schemas import ReasoningConfig, ResponseRequest, TextConfig, TextFormat
from flowkv_gateway.tokenizer import Vocabulary

Told = tuple[str, Json]  # the type of an event of a stream, and its other fields

_ID_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
# Some clients leave reasoning without it out of the history. Here none is looked at.
_ENCRYPTED = "unencrypted"


class _Part(NamedTuple):
    """What of an item has its text. `field` is its place in the item; the others begin names of events."""

    type: str
    field: str
    text_events: str
    part_events: str = "response.content_part"


_OUTPUT = _Part("output_text", "content", "response.output_text")
_THOUGHT = _Part("reasoning_text", "content", "response.reasoning_text")
_SUMMARY = _Part(
    "summary_text", "summary", "response.reasoning_summary_text", "response.reasoning_summary_part"
)


class ResponseWriter(ReplyWriter):
    """`/v1/responses`. A whole answer is what its stream ends with."""

    id_prefix = "resp_"

    def __init__(
        self,
        request: ResponseRequest,
        vocabulary: Vocabulary,
        model: str,
        store: Callable[[Json], None] | None = None,
    ) -> None:
        """`store` gets the response when it has ended."""
        super().__init__()
        self._vocabulary = vocabulary
        self._names: dict[str, Json] = {
            flat_name(tool.name, inner.name or ""): {"namespace": tool.name, "name": inner.name}
            for tool in request.tools or ()
            for inner in tool.tools or ()
        }
        # Clients that ask for a summary show nothing else.
        self._reasoning_part = _SUMMARY if request.reasoning and request.reasoning.summary else _THOUGHT
        self._reasoning: Json = {"summary": []}
        if "reasoning.encrypted_content" in (request.include or ()):
            self._reasoning["encrypted_content"] = _ENCRYPTED
        self._asked = {**_asked(request), "store": store is not None}
        self._store = store
        self._model = model
        self._created_at = int(time.time())
        self._num_events = 0
        self._finish_reason: str | None = None
        self._output: list[Json] = []  # complete items
        self._item: _Item | None = None  # the next one, while it is written
        self._logprobs: list[Json] = []  # of tokens whose text is still to come

    def whole(self, choices: Iterable[Sequence[Delta]], usage: Usage) -> bytes:
        for deltas in choices:
            for delta in deltas:
                for _ in self._take(delta):
                    pass
        return msgspec.json.encode(self._ended(usage))

    def opening(self, usage: GetUsage) -> bytes:
        response = self._response("in_progress")
        names = ("response.created", "response.in_progress")
        return self._encoded((name, {"response": response}) for name in names)

    def delta(self, delta: Delta, usage: GetUsage) -> bytes:
        return self._encoded(self._take(delta))

    def closing(self, usage: GetUsage) -> bytes:
        response = self._ended(usage())
        return self._encoded([(f"response.{response['status']}", {"response": response})])

    def failure(self, error: FlowKVError) -> bytes:
        code = getattr(error, "openai_code", None) or _ERROR_CODES.get(status_of(error), "server_error")
        response = self._response("failed", error={"code": code, "message": error.message})
        return self._encoded([("response.failed", {"response": response})])

    # --- the response ----------------------------------------------------------------------------

    def _response(self, status: str, **changed: object) -> Json:
        return {
            "id": self.reply_id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": self._output,
            "usage": None,
            **self._asked,
            **changed,
        }

    def _ended(self, usage: Usage) -> Json:
        ended: Json = {"completed_at": int(time.time())}
        is_complete = self._finish_reason != "length"
        if not is_complete:
            ended = {"incomplete_details": {"reason": "max_output_tokens"}}
        response = self._response("completed" if is_complete else "incomplete", usage=_usage(usage), **ended)
        if self._store is not None:
            self._store(response)
        return response

    # --- its items -------------------------------------------------------------------------------

    def _take(self, delta: Delta) -> Iterator[Told]:
        """What a stream tells of it."""
        if delta.logprob is not None:
            self._logprobs.append(token_logprob(self._vocabulary, delta.logprob))
        for event in delta.told():
            if self._item is None or self._item.type != _type_of(event) or isinstance(event, CallBegins):
                yield from self._complete()
                if self._output:  # tokens before this one stood between the items
                    del self._logprobs[:-1]
                yield from self._begin(event)
            if not isinstance(event, CallBegins):
                assert self._item is not None
                yield self._item.add(event.text, self._logprobs)
                self._logprobs = []
        if (reason := delta.finish_reason) is not None:
            self._finish_reason = reason
            if not self._output and self._item is None:  # an answer without a word
                yield from self._begin(Content(""))
            yield from self._complete("incomplete" if reason == "length" else "completed")

    def _begin(self, event: Event) -> Iterator[Told]:
        kind = _type_of(event)
        head: Json = {"id": f"{_ID_PREFIXES[kind]}{secrets.token_hex(12)}", "type": kind}
        part = None
        if isinstance(event, CallBegins):
            head["call_id"] = event.id or f"call_{secrets.token_hex(12)}"
            head |= self._names.get(event.name, {"name": event.name})
        elif kind == "message":
            head["role"] = "assistant"
            part = _OUTPUT
        else:
            head |= self._reasoning
            part = self._reasoning_part
        self._item = _Item(len(self._output), head, part)
        yield from self._item.begin()

    def _complete(self, status: str = "completed") -> Iterator[Told]:
        if self._item is not None:
            if self._item.has_broken_off:
                status = "incomplete"
            yield from self._item.end(status)
            self._output.append(self._item.shown(status))
            self._item = None

    def _encoded(self, events: Iterable[Told]) -> bytes:
        encoded = []
        for name, fields in events:
            encoded.append(named_event({"type": name, "sequence_number": self._num_events, **fields}))
            self._num_events += 1
        return b"".join(encoded)


class _Item:
    """An item of the output while it is written. `head` is what it has besides its text.

    The text is in its one part, that of a call, which has no `part`, are its arguments.
    """

    def __init__(self, index: int, head: Json, part: _Part | None) -> None:
        self.type: str = head["type"]
        self._index = index
        self._head = head
        self._part = part
        self._text_events = part.text_events if part else "response.function_call_arguments"
        self._place: Json = {"item_id": head["id"], "output_index": index}
        if part is not None:
            self._place[f"{part.field}_index"] = 0
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def begin(self) -> Iterator[Told]:
        text: Json = {self._part.field: []} if self._part else {"arguments": ""}
        item = {**self._head, "status": "in_progress", **text}
        yield "response.output_item.added", {"output_index": self._index, "item": item}
        if self._part is not None:
            yield f"{self._part.part_events}.added", {**self._place, "part": self._shown_part(self._part)}

    def add(self, text: str, logprobs: list[Json]) -> Told:
        """The next piece of its text, and its tokens if they are asked for."""
        self._texts.append(text)
        told = {**self._place, "delta": text}
        if self.type == "message":
            self._logprobs += logprobs
            told["logprobs"] = logprobs
        return f"{self._text_events}.delta", told

    @property
    def has_broken_off(self) -> bool:
        """Whether it is a call without the end of its arguments."""
        try:
            if self._part is None:
                msgspec.json.decode("".join(self._texts))
        except (msgspec.DecodeError, RecursionError):
            return True
        return False

    def end(self, status: str) -> Iterator[Told]:
        text = "".join(self._texts)
        if self._part is None:
            yield f"{self._text_events}.done", {**self._place, "name": self._head["name"], "arguments": text}
        else:
            told = {**self._place, "text": text}
            if self.type == "message":
                told["logprobs"] = self._logprobs
            yield f"{self._text_events}.done", told
            yield f"{self._part.part_events}.done", {**self._place, "part": self._shown_part(self._part)}
        yield "response.output_item.done", {"output_index": self._index, "item": self.shown(status)}

    def shown(self, status: str) -> Json:
        if self._part is None:
            return {**self._head, "status": status, "arguments": "".join(self._texts)}
        return {**self._head, "status": status, self._part.field: [self._shown_part(self._part)]}

    def _shown_part(self, part: _Part) -> Json:
        shown: Json = {"type": part.type, "text": "".join(self._texts)}
        if self.type == "message":
            shown |= {"annotations": [], "logprobs": self._logprobs}
        return shown


def _type_of(event: Event) -> str:
    """Of the item that has it."""
    if isinstance(event, CallBegins | Arguments):
        return "function_call"
    return "reasoning" if isinstance(event, Reasoning) else "message"


def _asked(request: ResponseRequest) -> Json:
    """What a response repeats of its request."""
    text, reasoning = request.text or TextConfig(), request.reasoning or ReasoningConfig()
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": msgspec.to_builtins(reasoning),
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "temperature": request.temperature,
        "text": {
            "format": msgspec.to_builtins(text.format or TextFormat("text")),
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": msgspec.to_builtins(request.tools or []),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning or 0},
        "total_tokens": usage.num_prompt + usage.num_output,
    }
