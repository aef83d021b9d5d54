"""An answer as OpenAI's Responses show it: items, whole or as events that add, fill and complete them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from flowkv_common.errors import FlowKVError
from flowkv_gateway.errors import status_of
from flowkv_gateway.output import Delta, GetUsage, Json, ReplyWriter, Usage, token_logprob
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Reasoning
from flowkv_gateway.responses import flat_name
from flowkv_gateway.schemas import ReasoningConfig, ResponseRequest, TextConfig, TextFormat
from flowkv_gateway.tokenizer import Vocabulary

Told = tuple[str, Json]  # the type of an event of a stream, and its other fields

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # a call has none
_ID_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


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
        events = delta.events
        if events is None:
            events = (Content(delta.text),) if delta.text else ()
        for event in events:
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
        self._item = _Item(len(self._output), event, self._names)
        yield from self._item.begin()

    def _complete(self, status: str = "completed") -> Iterator[Told]:
        if self._item is not None:
            yield from self._item.end(status)
            self._output.append(self._item.shown(status))
            self._item = None

    def _encoded(self, events: Iterable[Told]) -> bytes:
        encoded = []
        for name, fields in events:
            event = {"type": name, "sequence_number": self._num_events, **fields}
            encoded += [b"event: ", name.encode(), b"\ndata: ", msgspec.json.encode(event), b"\n\n"]
            self._num_events += 1
        return b"".join(encoded)


class _Item:
    """An item of the output while it is written. It begins with `event`.

    The text of a message and of reasoning is in its one part, that of a call are its arguments. `names` has
    the fields that name functions of namespaces.
    """

    def __init__(self, index: int, event: Event, names: Mapping[str, Json]) -> None:
        self.type = _type_of(event)
        self._index = index
        self._part = _PARTS.get(self.type, "")
        self._events = f"response.{self._part or 'function_call_arguments'}"
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._head: Json = {"id": f"{_ID_PREFIXES[self.type]}{secrets.token_hex(12)}", "type": self.type}
        if isinstance(event, CallBegins):
            self._head["call_id"] = event.id or f"call_{secrets.token_hex(12)}"
            self._head |= names.get(event.name, {"name": event.name})
        else:
            more: Json = {"role": "assistant"} if self.type == "message" else {"summary": []}
            self._head |= more
        self._place: Json = {"item_id": self._head["id"], "output_index": index}
        if self._part:
            self._place["content_index"] = 0

    def begin(self) -> Iterator[Told]:
        text: Json = {"content": []} if self._part else {"arguments": ""}
        item = {**self._head, "status": "in_progress", **text}
        yield "response.output_item.added", {"output_index": self._index, "item": item}
        if self._part:
            yield "response.content_part.added", {**self._place, "part": self._shown_part()}

    def add(self, text: str, logprobs: list[Json]) -> Told:
        """The next piece of its text, and its tokens if they are asked for."""
        self._texts.append(text)
        told = {**self._place, "delta": text}
        if self.type == "message":
            self._logprobs += logprobs
            told["logprobs"] = logprobs
        return f"{self._events}.delta", told

    def end(self, status: str) -> Iterator[Told]:
        text = "".join(self._texts)
        if not self._part:
            yield f"{self._events}.done", {**self._place, "name": self._head["name"], "arguments": text}
        else:
            told = {**self._place, "text": text}
            if self.type == "message":
                told["logprobs"] = self._logprobs
            yield f"{self._events}.done", told
            yield "response.content_part.done", {**self._place, "part": self._shown_part()}
        yield "response.output_item.done", {"output_index": self._index, "item": self.shown(status)}

    def shown(self, status: str) -> Json:
        text: Json = {"content": [self._shown_part()]} if self._part else {"arguments": "".join(self._texts)}
        return {**self._head, "status": status, **text}

    def _shown_part(self) -> Json:
        part: Json = {"type": self._part, "text": "".join(self._texts)}
        if self.type == "message":
            part |= {"annotations": [], "logprobs": self._logprobs}
        return part


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
