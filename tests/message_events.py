"""A stream of Anthropic's Messages, read as its clients read it."""

from __future__ import annotations

import json
from typing import Any


def events_of(stream: str) -> list[dict[str, Any]]:
    """Each says what it is in its name and in its JSON."""
    *events, rest = stream.split("\n\n")
    assert rest == ""
    shown = []
    for event in events:
        name, data = event.split("\n")
        shown.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {shown[-1]['type']}"
    return shown


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message as the official client puts it together. Checks that blocks are opened and closed."""
    first, *inner, end, last = events
    assert (first["type"], end["type"], last) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Any] = first["message"]
    assert message.pop("id").startswith("msg_")
    blocks: list[dict[str, Any]] = message["content"]
    written, is_open = "", False
    for event in inner:
        if event["type"] == "content_block_start":
            assert not is_open
            is_open, written = True, ""
            blocks.append(event["content_block"])
        assert event["index"] == len(blocks) - 1
        assert is_open
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            kind, field = delta["type"], [name for name in delta if name != "type"][0]
            if kind == "input_json_delta":
                written += delta[field]
                assert blocks[-1]["type"] == "tool_use"
            else:
                blocks[-1][field] += delta[field]
        elif event["type"] == "content_block_stop":
            is_open = False
            if blocks[-1]["type"] == "tool_use" and written:
                blocks[-1]["input"] = json.loads(written)
    assert not is_open
    return {**message, **end["delta"], "usage": {**message["usage"], **end["usage"]}}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "content": blocks}
