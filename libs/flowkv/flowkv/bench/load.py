"""Load over HTTP as many clients make it: requests come when they come, whatever becomes of earlier ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from flowkv.bench.traces import TOKEN_IDS, Request, tokens_of

MAX_LINE_BYTES = 1 << 20
MAX_ERROR_BYTES = 300  # that are shown


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


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    """`token_ids` where the server gives them, else a text tells that there is a token or more."""

    token_ids: list[int] | None = None
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def brings_tokens(self) -> bool:
        delta = self.delta
        return bool(self.token_ids or self.text or (delta and (delta.content or delta.reasoning_content)))


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Event(msgspec.Struct):
    """What a client of the API reads of an event, or of the body of an error."""

    id: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | str | None = None

    @property
    def error_message(self) -> str | None:
        if isinstance(self.error, dict):
            return str(self.error.get("message", "no message"))
        return self.error


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
    usage: Usage | None = None  # where the server tells

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.error is None and self.finish_reason is not None

    @property
    def num_output_tokens(self) -> int:
        """As ids came; else as the server counts them; else each event is taken for one."""
        if self.token_ids or self.usage is None:
            return len(self.token_ids) or len(self.event_times_s)
        return self.usage.completion_tokens

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
        times, num_tokens = self.event_times_s, self.num_output_tokens
        return (times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else 0.0


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


class Dialect(NamedTuple):
    """How a server is asked: where, with which further headers, and by which body for prompt and length."""

    path: str = "/v1/completions"
    headers: Mapping[str, str] = {}
    body: Callable[[Sequence[int], int], dict[str, Any]] = completion


OURS = Dialect()


async def stream(
    url: str, prompt_ids: Sequence[int], outcome: Outcome, *, timeout_s: float, dialect: Dialect = OURS
) -> None:
    """Asks for `outcome.arrival`, fills `outcome` in. Raises nothing: what went wrong is in its `error`.

    On a bare socket: an HTTP library costs several times as much per event, and then the client is measured.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s), connection(url) as (reader, writer):
            writer.write(request_bytes(url, prompt_ids, outcome.arrival.num_output_tokens, dialect))
            await read_answer(reader, outcome, began)
    except TimeoutError:
        outcome.error = f"no end after {timeout_s:g} s"
    except (OSError, EOFError, ValueError, LookupError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended_s = time.monotonic() - began


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = urlsplit(url)
    has_tls = address.scheme == "https"
    port = address.port or (443 if has_tls else 80)
    reader, writer = await asyncio.open_connection(
        address.hostname, port, limit=MAX_LINE_BYTES, ssl=has_tls or None
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request_bytes(url: str, prompt_ids: Sequence[int], max_tokens: int, dialect: Dialect = OURS) -> bytes:
    body = msgspec.json.encode(dialect.body(prompt_ids, max_tokens))
    address = urlsplit(url)
    headers = {
        "host": address.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        **dialect.headers,
    }
    head = f"POST {address.path.rstrip('/')}{dialect.path} HTTP/1.1\r\n"
    return (
        head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    ).encode() + body


async def read_answer(reader: asyncio.StreamReader, outcome: Outcome, began: float) -> None:
    """Reads the answer to its end, whatever it is, into `outcome`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status_line, *lines = head.split("\r\n")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    outcome.status = int(status_line.split()[1])
    if outcome.status != 200:
        body = b"".join([piece async for piece in pieces(reader, headers)])
        if "retry-after" in headers:
            outcome.retry_after_s = float(headers["retry-after"])
        # Not every server gives an error OpenAI's shape.
        outcome.error = f"status {outcome.status}: {body[:MAX_ERROR_BYTES].decode(errors='replace')}"
        with contextlib.suppress(msgspec.MsgspecError):
            outcome.error = decode_event(body).error_message or outcome.error
        return
    async for event in read_events(pieces(reader, headers)):
        at_s = time.monotonic() - began
        outcome.request_id = outcome.request_id or event.id
        outcome.usage = event.usage or outcome.usage
        if event.error:
            outcome.error = event.error_message
        for choice in event.choices:
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            if choice.brings_tokens:
                outcome.token_ids += choice.token_ids or ()
                outcome.event_times_s.append(at_s)


async def pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes, to its end: chunked, of a known length, or until the server hangs up."""
    if "chunked" in headers.get("transfer-encoding", ""):
        while num_bytes := int(await reader.readline(), 16):
            yield (await reader.readexactly(num_bytes + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(MAX_LINE_BYTES):
            yield piece


async def read_events(body: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """The server-sent events of a body, to its end."""
    rest = b""
    async for piece in body:
        *payloads, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for payload in payloads:
            # Anything else is a comment, which says only that the answer is on its way.
            if payload.startswith(b"data:") and not payload.endswith(b"[DONE]"):
                yield decode_event(payload.removeprefix(b"data:"))


async def drive(
    url: str,
    arrivals: Iterable[Arrival],
    *,
    seed: int = 0,
    timeout_s: float = 600.0,
    dialect: Dialect = OURS,
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
            tasks.create_task(stream(url, prompt_ids, outcome, timeout_s=timeout_s, dialect=dialect))
    return outcomes


async def ask(
    url: str,
    rng: random.Random,
    num_prompt_tokens: int,
    num_output_tokens: int,
    *,
    sent_s: float = 0.0,
    dialect: Dialect = OURS,
) -> Outcome:
    """One request now, with a random prompt, to its end."""
    outcome = Outcome(Arrival(sent_s, num_prompt_tokens, num_output_tokens), sent_s)
    prompt_ids = rng.choices(TOKEN_IDS, k=num_prompt_tokens)
    await stream(url, prompt_ids, outcome, timeout_s=300.0, dialect=dialect)
    return outcome


async def closed_loop(
    url: str,
    rng: random.Random,
    lengths: Lengths,
    num_clients: int,
    turns: Iterable[object],
    *,
    dialect: Dialect = OURS,
) -> list[Outcome]:
    """Clients with one request after the other; each request takes one of `turns`.

    A client whose request failed sends no other.
    """
    outcomes: list[Outcome] = []
    shared = iter(turns)
    began = time.monotonic()

    async def client() -> None:
        for _ in shared:  # whichever client is done takes the next
            sent_s = time.monotonic() - began
            outcomes.append(await ask(url, rng, *lengths.draw(rng), sent_s=sent_s, dialect=dialect))
            if not outcomes[-1].is_complete:
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_clients):
            tasks.create_task(client())
    return outcomes
