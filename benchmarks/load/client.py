"""One streamed completion over a connection of its own, on a bare socket.

An HTTP library costs several times as much per event, and then it is the client that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from benchmarks.load.arrivals import Arrival

_MAX_LINE_BYTES = 1 << 20
_DONE = b"[DONE]"


class _Choice(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are seconds since it was sent; `status` 0 is no answer at all."""

    arrival: Arrival
    sent_s: float  # since the beginning of the run
    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    event_times_s: list[float] = field(default_factory=list)  # of each event that brought tokens
    finish_reason: str | None = None
    error: str | None = None
    retry_after_s: float | None = None
    ended_s: float = 0.0
    request_id: str = ""  # as the gateway calls it, once it has answered

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.error is None and self.finish_reason is not None

    @property
    def late_s(self) -> float:
        """By how much the client itself was late."""
        return self.sent_s - self.arrival.at_s

    @property
    def ttft_s(self) -> float | None:
        return self.event_times_s[0] if self.event_times_s else None

    @property
    def itls_s(self) -> list[float]:
        """Between events: a client that gets two tokens at once has waited once."""
        return [after - before for before, after in itertools.pairwise(self.event_times_s)]


async def stream(
    url: str, prompt_ids: Sequence[int], outcome: Outcome, *, timeout_s: float, **extra: object
) -> None:
    """Asks for `outcome.arrival`, fills `outcome` in. Raises nothing: what went wrong is in its `error`."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s), _connection(url) as (reader, writer):
            writer.write(_request(urlsplit(url).netloc, prompt_ids, outcome.arrival.num_output_tokens, extra))
            await _read(reader, outcome, began)
    except TimeoutError:
        outcome.error = f"no end after {timeout_s:g} s"
    except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended_s = time.monotonic() - began


@contextlib.asynccontextmanager
async def _connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=_MAX_LINE_BYTES)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _request(host: str, prompt_ids: Sequence[int], max_tokens: int, extra: dict[str, object]) -> bytes:
    body = msgspec.json.encode(
        {
            "prompt": prompt_ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **extra,
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _read(reader: asyncio.StreamReader, outcome: Outcome, began: float) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status_line, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    outcome.status = int(status_line.split()[1])
    if outcome.status != 200:
        body = await reader.readexactly(int(headers["content-length"]))
        outcome.error = (_decode(body).error or _Error("no message")).message
        if "retry-after" in headers:
            outcome.retry_after_s = float(headers["retry-after"])
        return
    async for payload in _payloads(reader):
        if payload != _DONE:
            _take(outcome, _decode(payload), time.monotonic() - began)


async def _payloads(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """What follows `data: ` in each event of a chunked body, to its end."""
    rest = b""
    while num_bytes := int(await reader.readline(), 16):
        chunk = await reader.readexactly(num_bytes + 2)
        *events, rest = (rest + chunk[:-2]).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):  # else a comment, which says only that the answer is on its way
                yield event.removeprefix(b"data: ")


def _take(outcome: Outcome, event: _Event, at_s: float) -> None:
    outcome.request_id = outcome.request_id or event.id
    if event.error:
        outcome.error = event.error.message
    for choice in event.choices:
        outcome.finish_reason = choice.finish_reason or outcome.finish_reason
        if choice.token_ids:
            outcome.token_ids += choice.token_ids
            outcome.event_times_s.append(at_s)
