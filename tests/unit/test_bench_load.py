"""The load generator: when it sends, what it reads off the wire, and the figures it makes of that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import summarize
from benchmarks.report import quantiles
from flowkv.bench.load import Arrival, Lengths, Outcome, Phase, arrivals_of, drive, poisson, stream
from flowkv.bench.traces import Targets, read_trace

ARRIVAL = Arrival(0.0, 3, 2)
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


# --- arrivals ---------------------------------------------------------------------------------------


def test_phases_follow_each_other_at_their_rates() -> None:
    phases = [Phase("a", 50.0, 20.0, Lengths(100, 10)), Phase("b", 5.0, 20.0, Lengths(10, 100))]
    arrivals = list(poisson(phases, random.Random(3)))
    assert [arrival.at_s for arrival in arrivals] == sorted(arrival.at_s for arrival in arrivals)
    first = [arrival for arrival in arrivals if arrival.kind == "a"]
    second = [arrival for arrival in arrivals if arrival.kind == "b"]
    assert all(arrival.at_s < 20 for arrival in first)
    assert all(20 <= arrival.at_s < 40 for arrival in second)
    # Within four standard deviations of the means, 1000 and 100.
    assert 870 <= len(first) <= 1130
    assert 60 <= len(second) <= 140
    assert {arrival[1:3] for arrival in first} == {(100, 10)}
    assert list(poisson(phases, random.Random(3))) == arrivals


def test_lengths_spread_evenly_around_their_mean() -> None:
    drawn = [Lengths(100, 2, spread=0.5).draw(random.Random(seed)) for seed in range(400)]
    assert all(50 <= prompt <= 150 and 1 <= output <= 3 for prompt, output in drawn)
    assert min(prompt for prompt, _ in drawn) < 60
    assert max(prompt for prompt, _ in drawn) > 140


def test_a_trace_is_sent_as_fast_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    records = [
        {"timestamp": ms, "input_length": 5, "output_length": n, "hash_ids": [1]}
        for ms, n in ((0, 0), (3000, 7))
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert arrivals_of(read_trace(path), rate_factor=2.0) == [
        Arrival(0.0, 5, 1, "trace", (1,)),
        Arrival(1.5, 5, 7, "trace", (1,)),
    ]


# --- figures ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_quantiles_are_values_that_so_many_do_not_exceed(values: list[float]) -> None:
    found = quantiles(values)
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99), (1.0, found.max)):
        assert any(value == pytest.approx(each, abs=1e-4) for each in values)
        assert sum(each <= value + 1e-4 for each in values) >= share * len(values)
        assert sum(each < value - 1e-4 for each in values) < share * len(values)


def outcome(
    *times_s: float, status: int = 200, finish_reason: str | None = "length", error: str | None = None
) -> Outcome:
    return Outcome(
        ARRIVAL,
        0.25,
        status,
        token_ids=[1] * len(times_s),
        event_times_s=list(times_s),
        finish_reason=finish_reason,
        error=error,
    )


def test_summary_counts_what_kept_both_targets() -> None:
    outcomes = [
        outcome(0.5, 0.6, 0.7),
        outcome(1.5, 1.6),  # the first token too late
        outcome(0.5, 0.8),  # the second too slow
        outcome(0.5, finish_reason=None),  # cut off
        outcome(status=429, error="full", finish_reason=None),
        outcome(status=503, error="no node", finish_reason=None),
    ]
    summary = summarize(outcomes, Targets(ttft_s=1.0, tpot_s=0.2), duration_s=4.0)
    assert (summary["num_sent"], summary["num_complete"], summary["num_good"]) == (6, 3, 1)
    assert summary["goodput_per_s"] == 0.25
    assert summary["statuses"] == {"200": 4, "429": 1, "503": 1}
    assert summary["errors"] == {"no node": 1}
    assert (summary["itl_s"].num, summary["itl_s"].max) == (4, 0.3)
    assert summary["client_late_s"].max == 0.25


# --- the wire ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """Answers every connection by `answer`, after it has read the request."""
    answering: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answering.append(done)
        head = await reader.readuntil(b"\r\n\r\n")
        num_bytes = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(num_bytes)
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        done.set_result(None)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        async with asyncio.timeout(5):
            await asyncio.gather(*answering)


def events(*payloads: str) -> bytes:
    return b"".join(f"data: {payload}\n\n".encode() for payload in payloads)


def chunked(body: bytes, chunk_bytes: int) -> bytes:
    parts = [body[i : i + chunk_bytes] for i in range(0, len(body), chunk_bytes)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


STREAMED = events(
    '{"choices": [{"text": " a", "token_ids": [5], "finish_reason": null}]}',
    '{"choices": [{"text": " b c", "token_ids": [6, 7], "finish_reason": "length"}]}',
    "[DONE]",
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def ask(answer: Answer, timeout_s: float = 5.0) -> Outcome:
    result = Outcome(ARRIVAL, 0.0)
    async with server(answer) as url:
        await stream(url, [1, 2, 3], result, timeout_s=timeout_s)
    return result


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 4096])
async def test_events_are_found_however_they_are_cut(chunk_bytes: int) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunked(STREAMED, chunk_bytes))

    result = await ask(answer)
    assert (result.status, result.error, result.is_complete) == (200, None, True)
    assert result.token_ids == [5, 6, 7]
    assert len(result.event_times_s) == 2
    assert len(result.itls_s) == 1
    assert result.ttft_s == result.event_times_s[0] <= result.ended_s


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_server_that_gives_no_ids(newline: bytes, is_chunked: bool) -> None:
    """Tokens are what the server counts; a body may have no length but end with the connection."""
    body = events(
        '{"choices": [{"delta": {"role": "assistant"}}]}',
        '{"choices": [{"delta": {"reasoning_content": "Hm"}}]}',
        '{"choices": [{"delta": {"content": "so it is"}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 4}}',
        "[DONE]",
    ).replace(b"\n", newline)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunked(body, 7) if is_chunked else b"HTTP/1.1 200 OK\r\n\r\n" + body)

    result = await ask(answer)
    assert (result.error, result.is_complete, len(result.event_times_s)) == (None, True, 2)
    assert result.num_output_tokens == 4
    assert result.usage is not None
    assert result.usage.prompt_tokens == 11


async def test_comments_that_keep_a_connection_open_are_no_events() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunked(b": ping\n\n" + STREAMED, 64))

    result = await ask(answer)
    assert (result.error, result.is_complete, result.token_ids) == (None, True, [5, 6, 7])


async def test_a_refusal_keeps_its_message_and_retry_after() -> None:
    body = b'{"error": {"message": "12 s of work are queued", "type": "rate_limit_error"}}'

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)

    result = await ask(answer)
    assert (result.status, result.retry_after_s) == (429, 7.0)
    assert result.error == "12 s of work are queued"
    assert not result.is_complete


async def test_an_error_amid_the_stream_is_one() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = STREAMED.partition(b"\n\n")[0] + b"\n\n"
        writer.write(HEAD + chunked(first + events('{"error": {"message": "node lost"}}', "[DONE]"), 4096))

    result = await ask(answer)
    assert (result.status, result.error, result.token_ids) == (200, "node lost", [5])
    assert not result.is_complete


async def test_a_stream_that_is_cut_off_is_an_error() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunked(STREAMED, 16)[:-40])

    result = await ask(answer)
    assert result.error is not None
    assert not result.is_complete


async def test_a_server_that_says_nothing_is_left() -> None:
    async def answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client has gone

    result = await ask(answer, timeout_s=0.05)
    assert (result.status, result.error) == (0, "no end after 0.05 s")


async def test_nobody_there_is_an_error() -> None:
    result = Outcome(ARRIVAL, 0.0)
    async with server(lambda *_: asyncio.sleep(0)) as url:
        pass
    await stream(url, [1], result, timeout_s=5.0)
    assert result.status == 0
    assert result.error is not None


async def test_requests_are_sent_when_due_whether_or_not_others_are_answered() -> None:
    """The server answers nobody before all have asked."""
    num_requests = 20
    asked: list[int] = []
    all_asked = asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(1)
        if len(asked) == num_requests:
            all_asked.set()
        await all_asked.wait()
        writer.write(HEAD + chunked(STREAMED, 64))

    arrivals = [Arrival(0.005 * i, 4, 3) for i in range(num_requests)]
    async with server(answer) as url, asyncio.timeout(10):
        outcomes = await drive(url, arrivals, timeout_s=5.0)
    assert [each.arrival for each in outcomes] == arrivals
    assert all(each.is_complete and each.late_s >= 0 for each in outcomes)
