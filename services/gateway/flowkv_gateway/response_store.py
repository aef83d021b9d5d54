"""Responses that their clients may ask for again, or go on from: the newest ones, in memory."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from flowkv_common.errors import BadRequest, NotFound
from flowkv_gateway.schemas import InputItem

Json = dict[str, Any]

# A history can have megabytes: their number alone would not bound the memory.
MAX_BYTES = 256 * 1024 * 1024


class PreviousResponseNotFound(BadRequest):
    openai_code = "previous_response_not_found"


class Stored(NamedTuple):
    """JSON of a response, and of the items that it answers with those of earlier responses before them."""

    response: bytes
    input_items: bytes
    output_ids: Sequence[str] = ()  # of the response's items

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.input_items)


class _Output(msgspec.Struct):
    output: list[InputItem]


class ResponseStore:
    """Up to `max_responses` of them, 0 is none, and up to `max_bytes`. Each belongs to a name of keys."""

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES) -> None:
        self.max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()  # by key's name and response's id
        self._places: dict[tuple[str, str], str] = {}  # by key's name and output item's id: response's id

    def add(self, key_name: str, items: Sequence[InputItem], response: Json) -> None:
        """`items` are all that were said before it."""
        stored = Stored(
            msgspec.json.encode(response),
            msgspec.json.encode([_listed(one) for one in items]),
            [item["id"] for item in response["output"]],
        )
        self._stored[key_name, response["id"]] = stored
        self._num_bytes += stored.num_bytes
        for item_id in stored.output_ids:
            self._places[key_name, item_id] = response["id"]
        while len(self._stored) > self.max_responses or self._num_bytes > self._max_bytes:
            self.delete(*next(iter(self._stored)))

    def get(self, key_name: str, response_id: str) -> Stored:
        """Raises NotFound."""
        stored = self._stored.get((key_name, response_id))
        if stored is None:
            hint = "" if self.max_responses else ": responses are not stored here"
            raise NotFound(f"There is no response {response_id!r}{hint}.", field="response_id")
        return stored

    def delete(self, key_name: str, response_id: str) -> None:
        """Raises NotFound."""
        stored = self.get(key_name, response_id)
        del self._stored[key_name, response_id]
        self._num_bytes -= stored.num_bytes
        for item_id in stored.output_ids:
            self._places.pop((key_name, item_id), None)

    def history(self, key_name: str, response_id: str | None) -> list[InputItem]:
        """All that was said until the end of this response. Raises BadRequest if it is not there."""
        if response_id is None:
            return []
        if not self.max_responses:
            raise BadRequest(
                "previous_response_id is not supported, since responses are not stored here: "
                "send what was said before in `input`.",
                field="previous_response_id",
            )
        stored = self._stored.get((key_name, response_id))
        if stored is None:
            raise PreviousResponseNotFound(
                f"There is no response {response_id!r} any more: send what was said before in `input`.",
                field="previous_response_id",
            )
        return [*msgspec.json.decode(stored.input_items, type=list[InputItem]), *_output(stored)]

    def resolved(self, key_name: str, items: Sequence[InputItem]) -> list[InputItem]:
        """The items with those that references among them mean. Raises BadRequest for an unknown one."""
        return [
            self._item(key_name, item.id or "", f"input[{place}]") if item.type == "item_reference" else item
            for place, item in enumerate(items)
        ]

    def _item(self, key_name: str, item_id: str, field: str) -> InputItem:
        response_id = self._places.get((key_name, item_id))
        if response_id is None:
            raise BadRequest(
                f"There is no stored item {item_id!r}: send it itself, as clients do with `store: false`.",
                field=f"{field}.id",
            )
        output = _output(self._stored[key_name, response_id])
        return next(item for item in output if item.id == item_id)


def page_of_items(stored: Stored, wanted: Mapping[str, str]) -> Json:
    """The items that a response answers, newest first, as `limit`, `order` and `after` ask for them.

    Raises BadRequest.
    """
    items = msgspec.json.decode(stored.input_items, type=list[Json])
    limit, order = wanted.get("limit", "20"), wanted.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit) <= 100):
        raise BadRequest("limit is not a number from 1 to 100.", field="limit")
    if order not in ("asc", "desc"):
        raise BadRequest("order is asc or desc.", field="order")
    if order == "desc":
        items.reverse()
    if after := wanted.get("after"):
        if not (places := [place for place, item in enumerate(items, 1) if item["id"] == after]):
            raise BadRequest(f"There is no item {after!r}.", field="after")
        items = items[places[0] :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def _output(stored: Stored) -> list[InputItem]:
    return msgspec.json.decode(stored.response, type=_Output).output


def _listed(item: InputItem) -> Json:
    """The item as clients are shown it. They tell items apart by their ids."""
    shown: Json = msgspec.to_builtins(item)
    shown.setdefault("type", "message")
    shown.setdefault("id", f"item_{secrets.token_hex(12)}")
    if shown["type"] == "message" and isinstance(shown.get("content"), str):
        part = "output_text" if item.role == "assistant" else "input_text"
        shown["content"] = [{"type": part, "text": shown["content"]}]
    return shown
