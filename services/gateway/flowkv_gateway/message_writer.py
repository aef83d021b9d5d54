"""An answer as Anthropic's Messages show it: blocks, whole or as events that open, fill and close them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from flowkv_common.errors import FlowKVError
from flowkv_gateway.errors import ANTHROPIC_PATH, error_body
from flowkv_gateway.output import Delta, GetUsage, Json, ReplyWriter, Usage, named_event
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Leftover, Reasoning

# Clients want one with each thought, and some leave thoughts without one out of the history. Here none is
# looked at.
_SIGNATURE = "unsigned"


class MessageWriter(ReplyWriter):
    """`/v1/messages`. A stream begins with the first token: before, what was cached is not known."""

    id_prefix = "msg_"
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, model: str, max_tokens: int) -> None:
        super().__init__()
        self._model = model
        self._max_tokens = max_tokens
        self._num_blocks = 0
        self._open: type[Event] | None = None  # what the open block of a stream holds
        self._last: Delta | None = None

    def whole(self, choices: Iterable[Sequence[Delta]], usage: Usage) -> bytes:
        [deltas] = choices
        blocks = _blocks(event for delta in deltas for event in delta.told())
        return msgspec.json.encode(self._message(blocks, usage, self._end(deltas[-1], usage)))

    def delta(self, delta: Delta, usage: GetUsage) -> bytes:
        events: list[Json] = []
        if self._last is None:
            message = self._message([], usage(), {"stop_reason": None, "stop_sequence": None})
            events.append({"type": "message_start", "message": message})
        for event in delta.told():
            events += self._shown(event)
        if delta.finish_reason is not None:
            events += self._closed()
        self._last = delta
        return _encoded(events)

    def closing(self, usage: GetUsage) -> bytes:
        assert self._last is not None
        end, used = self._end(self._last, usage()), _usage(usage())
        return _encoded([{"type": "message_delta", "delta": end, "usage": used}, {"type": "message_stop"}])

    def failure(self, error: FlowKVError) -> bytes:
        return b"event: error\ndata: " + error_body(error, ANTHROPIC_PATH) + b"\n\n"

    # --- a stream's blocks -----------------------------------------------------------------------

    def _shown(self, event: Event) -> Iterator[Json]:
        """What a stream tells of it. Pieces of one kind go on with the open block, a call begins one."""
        if _kind(event) is not self._open or isinstance(event, CallBegins):
            yield from self._closed()
            yield {"type": "content_block_start", "index": self._num_blocks, "content_block": _begun(event)}
            self._num_blocks += 1
            self._open = _kind(event)
        if not isinstance(event, CallBegins):
            yield self._piece(event)

    def _closed(self) -> Iterator[Json]:
        """The end of the open block, if there is one."""
        if self._open is None:
            return
        if self._open is Reasoning:
            yield self._in_block({"type": "signature_delta", "signature": _SIGNATURE})
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}
        self._open = None

    def _piece(self, event: Content | Reasoning | Arguments | Leftover) -> Json:
        if isinstance(event, Arguments):
            return self._in_block({"type": "input_json_delta", "partial_json": event.text})
        if isinstance(event, Reasoning):
            return self._in_block({"type": "thinking_delta", "thinking": event.text})
        return self._in_block({"type": "text_delta", "text": event.text})

    def _in_block(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    # --- the message -----------------------------------------------------------------------------

    def _message(self, blocks: list[Json], usage: Usage, end: Json) -> Json:
        return {
            "id": self.reply_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **end,
            "usage": _usage(usage),
        }

    def _end(self, last: Delta, usage: Usage) -> Json:
        stop_sequence = None
        if last.finish_reason == "tool_calls":
            reason = "tool_use"
        elif last.finish_reason == "length":
            # With less than what it may have, there was no more room.
            is_full = usage.num_output < self._max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        elif isinstance(last.stopped_by, str):
            reason, stop_sequence = "stop_sequence", last.stopped_by
        else:
            reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_sequence}


def _begun(event: Event) -> Json:
    """The block that begins with this event, still without its content."""
    if isinstance(event, CallBegins):
        call_id = event.id or f"toolu_{secrets.token_hex(12)}"
        return {"type": "tool_use", "id": call_id, "name": event.name, "input": {}}
    if isinstance(event, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _kind(event: Event) -> type[Event]:
    """What a block holds that holds this."""
    return CallBegins if isinstance(event, Arguments) else type(event)


def _blocks(events: Iterable[Event]) -> list[Json]:
    """All of a whole answer."""
    blocks: list[Json] = []
    texts: list[list[str]] = []
    kind: type[Event] | None = None
    for event in events:
        if _kind(event) is not kind or isinstance(event, CallBegins):
            kind = _kind(event)
            blocks.append(_begun(event))
            texts.append([])
        if not isinstance(event, CallBegins):
            texts[-1].append(event.text)
    for block, pieces in zip(blocks, texts, strict=True):
        text = "".join(pieces)
        if block["type"] == "tool_use":
            block["input"] = msgspec.Raw(text.encode() or b"{}")
        elif block["type"] == "thinking":
            block |= {"thinking": text, "signature": _SIGNATURE}
        else:
            block["text"] = text
    return blocks


def _usage(usage: Usage) -> Json:
    shown: dict[str, Any] = {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_output,
        "service_tier": "standard",
    }
    if usage.num_reasoning is not None:
        shown["output_tokens_details"] = {"thinking_tokens": usage.num_reasoning}
    return shown


def _encoded(events: Iterable[Json]) -> bytes:
    return b"".join(map(named_event, events))
