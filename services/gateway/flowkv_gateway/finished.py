"""The requests that have ended here last: where their time went is asked for after the fact."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from flowkv_common.wire.messages import FindFinished, FinishedRequests, RequestFinished, encode

# Some 3 MB: a few minutes of a busy gateway, an afternoon of one that is tried out.
MAX_FINISHED = 1000


class FinishedLog:
    """The last `MAX_FINISHED`, encoded: a thousand of them as objects would be work for the collector."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._events: OrderedDict[str, bytes] = OrderedDict()  # by request id, the newest last
        self.num_added = 0

    def add(self, event: RequestFinished) -> None:
        self._events[event.request_id] = encode(event)
        self.num_added += 1
        if len(self._events) > MAX_FINISHED:
            self._events.popitem(last=False)

    def last(self, count: int, max_bytes: int) -> list[RequestFinished]:
        """The newest first, no more than together have `max_bytes`."""
        found: list[RequestFinished] = []
        for event in reversed(self._events.values()):
            max_bytes -= len(event)
            if len(found) == count or max_bytes < 0:
                break
            found.append(msgspec.json.decode(event, type=RequestFinished))
        return found

    def find(self, wanted: FindFinished, max_bytes: int) -> FinishedRequests:
        """The answer of this gateway, of at most `max_bytes`; nothing of a request that it does not know."""
        if not wanted.request_id:
            return FinishedRequests(
                gateway_id=self._gateway_id, requests=self.last(wanted.last, max_bytes - 1024)
            )
        event = self._events.get(wanted.request_id)
        found = [msgspec.json.decode(event, type=RequestFinished)] if event else []
        return FinishedRequests(gateway_id=self._gateway_id, requests=found)
