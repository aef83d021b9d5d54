"""Load over HTTP as many clients make it: requests come when they come, whatever becomes of earlier ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from flowkv.bench.traces import TOKEN_IDS, Request, tokens_of

MAX_LINE_BYTES = 1 << 20


# --- when requests come, and how long they are ------------------------------------------------------


class Lengths(NamedTuple):
    """What a kind of request asks for. `spread` is the share by which both may be longer or shorter."""

    num_prompt_tokens: int
    num_output_tokens: int
    spread: float = 0.0

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Prompt and output tokens of one request, at least 1 each."""
        factors = (rng.uniform(1 - self.spread, 1 + self.spread) for _ in range(2))
        prompt, output = (max(1, round(n * f)) for n, f in zip(self[:2], factors, strict=True))
        return prompt, output


class Arrival(NamedTuple):
    """One request, `at_s` seconds after the beginning. `kind` is what the tables call it.

    Of prompts with `hash_ids` equal ones begin with equal tokens; without, no two do.
    """

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    kind: str = ""
    hash_ids: Sequence[int] = ()


class Phase(NamedTuple):
    """So many requests per second, on average, for so long."""

    kind: str
    rate_per_s: float
    duration_s: float
    lengths: Lengths


def poisson(phases: Sequence[Phase], rng: random.Random) -> Iterator[Arrival]:
    """Each phase after the other: the gaps between arrivals are exponential, so they come in bursts."""
    begins_s = 0.0
    for phase in phases:
        at_s = rng.expovariate(phase.rate_per_s)
        while at_s < phase.duration_s:
            yield Arrival(begins_s + at_s, *phase.lengths.draw(rng), phase.kind)
            at_s += rng.expovariate(phase.rate_per_s)
        begins_s += phase.duration_s


def arrivals_of(requests: Iterable[Request], rate_factor: float = 1.0) -> list[Arrival]:
    """The requests of a trace; `rate_factor` 2 sends the same twice as fast."""
    return [
        Arrival(at / rate_factor, num_prompt, num_output, "trace", hash_ids)
        for num_prompt, num_output, hash_ids, at, _ in requests
    ]


# --- the client -------------------------------------------------------------------------------------


class Choice(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None


class Event(msgspec.Struct):
    """What a client of the API reads of an event, or of the body of an error."""

    id: str = ""
    choices: list[Choice] = []
    error: dict[str, Any] | None = None


decode_event = msgspec.json.Decoder(Event).decode


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

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 where there is only one."""
        times, num_tokens = self.event_times_s, len(self.token_ids)
        return (times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else 0.0


async def stream(url: str, prompt_ids: Sequence[int], outcome: Outcome, *, timeout_s: float) -> None:
    """Asks for `outcome.arrival`, fills `outcome` in. Raises nothing: what went wrong is in its `error`.

    On a bare socket: an HTTP library costs several times as much per event, and then the client is measured.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s), connection(url) as (reader, writer):
            writer.write(request_bytes(url, prompt_ids, outcome.arrival.num_output_tokens))
            await read_answer(reader, outcome, began)
    except TimeoutError:
        outcome.error = f"no end after {timeout_s:g} s"
    except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended_s = time.monotonic() - began


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=MAX_LINE_BYTES)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def completion(prompt_ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """The body that asks for a greedy streamed completion of exactly `max_tokens` tokens."""
    return {
        "prompt": prompt_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def request_bytes(url: str, prompt_ids: Sequence[int], max_tokens: int) -> bytes:
    body = msgspec.json.encode(completion(prompt_ids, max_tokens))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_answer(reader: asyncio.StreamReader, outcome: Outcome, began: float) -> None:
    """Reads the answer to its end, whatever it is, into `outcome`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status_line, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    outcome.status = int(status_line.split()[1])
    if outcome.status != 200:
        body = await reader.readexactly(int(headers["content-length"]))
        outcome.error = (decode_event(body).error or {}).get("message", "no message")
        if "retry-after" in headers:
            outcome.retry_after_s = float(headers["retry-after"])
        return
    async for event in read_events(reader):
        at_s = time.monotonic() - began
        outcome.request_id = outcome.request_id or event.id
        if event.error:
            outcome.error = event.error.get("message", "no message")
        for choice in event.choices:
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            if choice.token_ids:
                outcome.token_ids += choice.token_ids
                outcome.event_times_s.append(at_s)


async def read_events(reader: asyncio.StreamReader) -> AsyncIterator[Event]:
    """The server-sent events of a chunked body, to its end."""
    rest = b""
    while num_bytes := int(await reader.readline(), 16):
        chunk = await reader.readexactly(num_bytes + 2)
        *payloads, rest = (rest + chunk[:-2]).split(b"\n\n")
        for payload in payloads:
            # Anything else is a comment, which says only that the answer is on its way.
            if payload.startswith(b"data: ") and payload != b"data: [DONE]":
                yield decode_event(payload.removeprefix(b"data: "))


async def drive(
    url: str, arrivals: Iterable[Arrival], *, seed: int = 0, timeout_s: float = 600.0
) -> list[Outcome]:
    """Sends each request when it is due, whatever became of others; the outcomes, in order of arrival."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for arrival in arrivals:
            num_prompt = arrival.num_prompt_tokens
            prompt_ids = tokens_of(arrival.hash_ids, num_prompt) or rng.choices(TOKEN_IDS, k=num_prompt)
            await asyncio.sleep(began + arrival.at_s - time.monotonic())
            outcome = Outcome(arrival, time.monotonic() - began)
            outcomes.append(outcome)
            tasks.create_task(stream(url, prompt_ids, outcome, timeout_s=timeout_s))
    return outcomes


async def ask(url: str, rng: random.Random, num_prompt_tokens: int, num_output_tokens: int) -> Outcome:
    """One request now, with a random prompt, to its end."""
    outcome = Outcome(Arrival(0.0, num_prompt_tokens, num_output_tokens), 0.0)
    prompt_ids = rng.choices(TOKEN_IDS, k=num_prompt_tokens)
    await stream(url, prompt_ids, outcome, timeout_s=300.0)
    return outcome


async def closed_loop(
    url: str, rng: random.Random, lengths: Lengths, num_clients: int, turns: Iterable[object]
) -> list[Outcome]:
    """Clients with one request after the other; each request takes one of `turns`.

    A client whose request failed sends no other.
    """
    outcomes: list[Outcome] = []
    shared = iter(turns)

    async def client() -> None:
        for _ in shared:  # whichever client is done takes the next
            outcomes.append(await ask(url, rng, *lengths[:2]))
            if not outcomes[-1].is_complete:
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_clients):
            tasks.create_task(client())
    return outcomes
