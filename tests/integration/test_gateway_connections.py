"""What a gateway's client sees of its connection: how long it lives, what is spoken on it, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message

from flowkv_common.config import GatewaySettings
from flowkv_common.errors import Full
from flowkv_gateway import answer, http
from flowkv_gateway.app import Api
from flowkv_gateway.errors import STOPPED
from flowkv_gateway.models import Models
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import (
    MODEL,
    Gateway,
    ScriptedDispatch,
    ScriptedNodes,
    model_in_memory,
    serving,
    text_chunks,
)

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "say hello"}]}
SOON_S = 0.05
LINE_BREAKS = "one\u2028two\u2029three\u0085four \U0001f600"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds comes soon."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", SOON_S)
    monkeypatch.setattr(answer, "HEADERS_AFTER_S", SOON_S)


def post(body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(payload)}\r\n"
    return head.encode() + b"x-request-id: abc-1\r\n\r\n" + payload


@contextlib.asynccontextmanager
async def ask(gateway: Gateway, stream: bool) -> AsyncIterator[asyncio.StreamReader]:
    """A request on a connection of its own, once the dispatch has it."""
    async with gateway.connect() as (reader, writer):
        writer.write(post({**CHAT, "stream": stream}))
        await gateway.dispatch.was_asked.wait()
        gateway.dispatch.was_asked.clear()
        yield reader


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Gateway]:
    async with serving(tokenizer, ping_s=SOON_S) as gateway:
        yield gateway


# --- how long it lives -----------------------------------------------------------------------------


async def ask_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    await reader.readuntil(b"}")


@pytest.mark.usefixtures("impatient")
async def test_an_idle_connection_is_kept_longer_than_a_head_may_take(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway, gateway.connect() as (reader, writer):
        for _ in range(3):
            await ask_version(reader, writer)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4 * SOON_S):
                    await reader.read(1)


async def test_an_idle_connection_is_closed_without_a_word_after_its_time(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, keep_alive_s=SOON_S) as gateway, gateway.connect() as (reader, writer):
        await ask_version(reader, writer)
        assert await reader.read() == b""


@pytest.mark.usefixtures("impatient")
async def test_only_who_has_begun_to_ask_is_told_that_it_was_late(gateway: Gateway) -> None:
    async with gateway.connect() as (reader, _):
        assert await reader.read() == b""
    async with gateway.connect() as (reader, writer):
        await ask_version(reader, writer)
        writer.write(b"GET /vers")
        assert b" 408 " in await reader.read()


# --- what is spoken on it --------------------------------------------------------------------------

CHUNKED = b"transfer-encoding: chunked\r\n"
HIDDEN = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "status_line"),
    [
        pytest.param(b"HTTP/1.1\r\ncontent-length: 5\r\n" + CHUNKED, b"400 Bad Request", id="two framings"),
        pytest.param(
            b"HTTP/1.1\r\n" + CHUNKED + b"content-length: 5\r\n", b"400 Bad Request", id="the other way round"
        ),
        pytest.param(b"HTTP/1.0\r\n" + CHUNKED, b"400 Bad Request", id="chunks in HTTP/1.0"),
        pytest.param(b"HTTP/9.9\r\n", b"505 HTTP Version Not Supported", id="another version"),
        pytest.param(b"HTTP/2.0\r\n", b"505 HTTP Version Not Supported", id="HTTP/2 without a handshake"),
    ],
)
async def test_a_head_that_can_be_read_in_two_ways_is_refused_and_the_end(
    gateway: Gateway, head: bytes, status_line: bytes
) -> None:
    async with gateway.connect() as (reader, writer):
        writer.write(b"POST /v1/chat/completions " + head + b"host: localhost\r\n\r\n0\r\n\r\n" + HIDDEN)
        said = await reader.read()
    first, _, body = said.partition(b"\r\n\r\n")
    assert first.splitlines()[0] == b"HTTP/1.1 " + status_line
    assert b"connection: close" in first.lower()
    assert b"\r\nx-request-id: req-" in first
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert gateway.dispatch.asked == []


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/version", 200),
        (b"HTTPS://x:1/version?a=http://y/", 200),
        (b"http://x", 404),
        (b"http://x?a", 404),
    ],
)
async def test_the_target_may_be_absolute(gateway: Gateway, target: bytes, status: int) -> None:
    async with gateway.connect() as (reader, writer):
        writer.write(b"GET " + target + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert f" {status} ".encode() in await reader.readline()


async def test_a_compressed_body_is_refused_as_such(gateway: Gateway) -> None:
    body = gzip.compress(json.dumps(CHAT).encode())
    response = await gateway.http.post(
        "/v1/chat/completions", content=body, headers={"content-encoding": "gzip"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "content-encoding")
    assert "gzip" in error["message"]
    plain = await gateway.http.post("/tokenize", json=CHAT, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


# --- a stream that is silent -----------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_a_stream_that_waits_has_headers_and_comments(gateway: Gateway, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    gateway.dispatch.script = [gate, *text_chunks(tokenizer, "hello")]
    async with ask(gateway, stream=True) as reader:
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            await reader.readuntil(b": ping\n\n")
        gate.set()
        said = await reader.readuntil(b"[DONE]")
    assert said.count(b"ping") <= 1
    gate.clear()
    stream = await gateway.client.chat.completions.create(**CHAT, model=MODEL, stream=True)
    await asyncio.sleep(3 * SOON_S)  # it is the silence that is tried
    gate.set()
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "hello"


@pytest.mark.usefixtures("impatient")
async def test_comments_can_be_switched_off(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, ping_s=0) as gateway:
        gate = asyncio.Event()
        gateway.dispatch.script = [gate, *text_chunks(tokenizer, "hello")]
        async with ask(gateway, stream=True) as reader:
            await reader.readuntil(b"\r\n\r\n")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4 * SOON_S):
                    await reader.read(1)
            gate.set()
            assert b"ping" not in await reader.readuntil(b"[DONE]")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("is_late", [False, True])
async def test_an_error_has_its_status_until_the_headers_are_gone(gateway: Gateway, is_late: bool) -> None:
    gate = asyncio.Event()
    gateway.dispatch.script = [gate, Full("no room", retry_after_s=3)]
    async with ask(gateway, stream=True) as reader:
        if is_late:
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        gate.set()
        head = b"" if is_late else await reader.readuntil(b"\r\n\r\n")
        body = await reader.readuntil(b"}}")
    assert is_late or (b" 429 " in head and b"retry-after: 3" in head)
    error = json.loads(body[body.index(b'{"error') :])["error"]
    assert (error["message"], error["type"]) == ("no room", "rate_limit_error")


async def test_what_some_take_for_a_line_break_is_escaped(gateway: Gateway, tokenizer: Tokenizer) -> None:
    gateway.dispatch.script = text_chunks(tokenizer, LINE_BREAKS)
    async with gateway.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"]["content"] for line in lines]
    assert "".join(deltas) == LINE_BREAKS


# --- how it ends -----------------------------------------------------------------------------------


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def test_who_is_about_to_stop_is_not_ready_but_serves(gateway: Gateway) -> None:
    assert (await gateway.http.get("/health/ready")).status_code == 200
    gateway.stop.set()
    for path in ("/health", "/health/ready", "/ping"):
        response = await gateway.http.get(path)
        assert (response.status_code, response.text) == (503, "about to stop\n")
    async with gateway.connect() as (reader, writer):
        writer.write(post(CHAT))
        said = await reader.read()
    assert b"200 OK" in said
    assert b"connection: close" in said
    assert b'"content":"hello"' in said


@pytest.mark.usefixtures("no_errors")
async def test_open_answers_end_by_themselves(gateway: Gateway, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    gateway.dispatch.script = [*text_chunks(tokenizer, "hello")[:1], gate, *text_chunks(tokenizer, "hello")]
    async with ask(gateway, stream=True) as stream, ask(gateway, stream=False) as whole:
        gateway.leave.set()
        await until_refused(gateway)
        gate.set()
        assert (await stream.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"200 OK" in await whole.read()


async def until_refused(gateway: Gateway) -> None:
    """Nobody listens any more."""
    async with asyncio.timeout(10):
        # Reset, if the listener was shut while the connection stood in its queue.
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                writer.transport.abort()


@pytest.mark.usefixtures("no_errors")
async def test_who_is_cut_off_at_the_end_is_told(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream by an event, a whole answer and a request that is still being sent by 503."""
    caplog.set_level(logging.INFO)
    async with serving(tokenizer, drain_timeout_s=SOON_S) as gateway:
        gateway.dispatch.script = [*text_chunks(tokenizer, "hello")[:1], asyncio.Event()]
        async with (
            ask(gateway, stream=True) as stream,
            ask(gateway, stream=False) as whole,
            gateway.connect() as (late, writer),
        ):
            await stream.readuntil(b"\n\n")
            writer.write(post(CHAT)[:-5])
            await ask_version_of(gateway)  # by then what was written before has come
            gateway.leave.set()
            *_, event, end = (await stream.read()).split(b"\n\n")
            assert json.loads(event[event.index(b"{") :])["error"] == {
                "message": STOPPED,
                "type": "service_unavailable",
                "param": None,
                "code": None,
            }
            assert end == b"\r\n0\r\n\r\n"
            for reader in (whole, late):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                assert b" 503 " in head
                assert b"retry-after: 1" in head
                assert b"x-request-id: abc-1" in head
                assert json.loads(body)["error"]["message"] == STOPPED


async def ask_version_of(gateway: Gateway) -> None:
    async with gateway.connect() as (reader, writer):
        await ask_version(reader, writer)


@pytest.mark.usefixtures("no_errors")
async def test_a_client_that_never_reads_does_not_hold_the_server_up(tokenizer: Tokenizer) -> None:
    class Endless(list[Any]):
        def __iter__(self) -> Any:
            while True:
                yield self[0]

    async with serving(tokenizer, drain_timeout_s=SOON_S) as gateway:
        gateway.dispatch.script = Endless(text_chunks(tokenizer, "hello")[:1])
        async with ask(gateway, stream=True):
            gateway.leave.set()
            await gateway.dispatch.was_cancelled.wait()


async def test_who_is_cut_off_at_the_end_and_does_not_read_is_no_client_that_left(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = GatewaySettings(model_path="unused", model_name=MODEL)
    dispatch, registry = ScriptedDispatch([asyncio.Event()]), CollectorRegistry()
    models = Models([model_in_memory(settings, tokenizer, ScriptedNodes(dispatch))])
    api = Api(settings, models, dispatch, registry, asyncio.Event())
    body = [json.dumps(CHAT).encode()]
    is_told = asyncio.Event()

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop()}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(_: Message) -> None:
        is_told.set()
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    async with asyncio.timeout(10):
        serving = asyncio.ensure_future(api.app(scope, receive, send))
        await dispatch.was_asked.wait()
        serving.cancel()  # the time to drain is over
        await is_told.wait()
        serving.cancel()  # the time for a last word, too
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    [line] = [record.__dict__["fields"] for record in caplog.records if hasattr(record, "fields")]
    assert (line["status"], line["error"]) == (503, "Unavailable")
    labels = {"model_name": MODEL, "finished_reason": "error"}
    assert registry.get_sample_value("vllm:request_success_total", labels) == 1
    assert registry.get_sample_value("flowkv_gateway_errors_total", {"status": "503"}) == 1
