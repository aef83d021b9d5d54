"""Whatever a client sends gets the right error, and costs nobody else anything (DESIGN 7.14)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowkv.local_cluster import Cluster, free_port
from flowkv.processes import Process
from tests.e2e.bad_bodies import BAD_BODIES, BAD_HEADERS, CHAT, MESSAGES_PATH, TEXT, USER, BadBody
from tests.e2e.load import stream_completion, wait_healthy
from tests.e2e.observer import observe
from tests.e2e.raw_client import connect, post

NODES = ("prefill-0", "decode-0")
PROMPT = [100, 200, 300]
MAX_BODY_BYTES = 4 * 1024 * 1024
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        yield http


@pytest.fixture(autouse=True)
def _no_process_ends(cluster: Cluster) -> Iterator[None]:
    processes = dict(cluster.processes)
    yield
    ended = {name: process.log_tail() for name, process in processes.items() if not process.is_running}
    assert not ended


def check_error(response: httpx.Response, status: int, param: str | None = None) -> None:
    shown = response.json()
    assert response.status_code == status, shown
    check_shape(shown)
    assert shown["error"]["param"] == param, shown


def check_shape(shown: dict[str, Any]) -> None:
    assert set(shown) == {"error"}
    assert set(shown["error"]) == {"message", "type", "param", "code"}
    assert shown["error"]["message"]
    assert shown["error"]["type"]


async def check_unharmed(cluster: Cluster) -> None:
    """The next request is served, and then nothing is held anywhere."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        stream = await stream_completion(http, PROMPT, max_tokens=3)
    assert len(stream.token_ids) == 3
    async with observe(cluster.nats_url) as observer:
        await observer.wait_idle()


# --- bodies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_BODIES, ids=lambda bad: bad.name)
def test_bad_body_names_the_field(http: httpx.Client, bad: BadBody) -> None:
    response = http.post(bad.path, content=bad.body)
    if bad.path != MESSAGES_PATH:
        check_error(response, 400, bad.param)
        return
    shown = response.json()
    assert (response.status_code, shown["type"]) == (400, "error"), shown
    assert shown["error"]["type"] == "invalid_request_error"
    assert (bad.param or "JSON") in shown["error"]["message"]


def test_a_bad_header_is_named(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2}
    for name, value in BAD_HEADERS:
        check_error(http.post(TEXT, json=body, headers={name: value}), 400, name)
    good = {"x-ttft-goal-ms": "60000", "x-itl-goal-ms": "500", "x-request-class": "batch"}
    assert http.post(TEXT, json=body, headers=good).status_code == 200


async def test_a_good_stream_does_not_notice(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        alone = await stream_completion(http, PROMPT, max_tokens=32)

        async def barrage() -> None:
            for bad in BAD_BODIES:
                assert (await http.post(bad.path, content=bad.body)).status_code == 400

        async with asyncio.TaskGroup() as tasks:
            good = tasks.create_task(stream_completion(http, PROMPT, max_tokens=32))
            for _ in range(3):
                tasks.create_task(barrage())
        assert good.result().token_ids == alone.token_ids
    await check_unharmed(cluster)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_body_over_the_limit(cluster: Cluster, is_chunked: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            yield b" " * 65536

    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        content = parts() if is_chunked else b" " * (MAX_BODY_BYTES + 1)
        check_error(await http.post(CHAT, content=content), 413)
    await check_unharmed(cluster)


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_unknown_model(http: httpx.Client, path: str) -> None:
    body = {"model": "another", "messages": USER, "prompt": "hi", "tokens": [5]}
    if path == "/tokenize":
        del body["messages"]
    response = http.post(path, json=body)
    check_error(response, 404, "model")
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/nope", "/v1/models/another", "/v1/models/%ff", "/v1/completions/", "/live/"]
)
def test_unknown_path(http: httpx.Client, path: str) -> None:
    check_error(http.get(path), 404, "model" if "models" in path else None)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CHAT), ("DELETE", TEXT), ("POST", "/v1/models"), ("BREW", CHAT)]
)
def test_wrong_method(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, path)
    check_error(response, 405)
    assert response.headers["allow"]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(b'"max_tokens": 7, "max_tokens": 2', id="the last of two keys counts"),
        pytest.param(b'"max_tokens": 2, "unknown": 1' + b"0" * 400, id="huge number in an unknown field"),
        pytest.param(b'"max_tokens": 2, "unknown": [{"a": null}]', id="unknown field"),
        pytest.param(b'"max_tokens": 2, "user": "\\ud83d\\ude00\\u0000"', id="escapes that are right"),
    ],
)
def test_odd_but_good_bodies(http: httpx.Client, extra: bytes) -> None:
    response = http.post(TEXT, content=b'{"prompt": "hi", "ignore_eos": true, ' + extra + b"}")
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 2


# --- below HTTP --------------------------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS"),
        pytest.param(b"\x00" * 70_000, 400, id="zeros"),
        pytest.param(b"hello\r\n\r\n", 400, id="no HTTP"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(HEAD + b"x: " + b"a" * 200_000, 431, id="a header without end"),
        pytest.param(HEAD + b"".join(b"x%d: a\r\n" % i for i in range(20_000)), 431, id="header flood"),
        pytest.param(HEAD + b"content-length: ten\r\n\r\n", 400, id="length is no number"),
        pytest.param(HEAD + b"content-length: -1\r\n\r\n", 400, id="negative length"),
        pytest.param(HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400, id="two lengths"),
        pytest.param(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, id="broken chunk"),
        pytest.param(HEAD + b"transfer-encoding: gzip\r\n\r\n", 501, id="unknown encoding"),
    ],
)
async def test_what_is_no_http(cluster: Cluster, data: bytes, status: int) -> None:
    async with asyncio.timeout(10), connect(cluster.port) as client:
        await client.send(data)
        shown_status, shown = await client.response()
        assert shown_status == status
        check_shape(shown)
        await client.closed()


async def test_silent_clients_are_let_go(cluster: Cluster) -> None:
    """A head that does not end, a refused body that does not end, no byte at all; and others do not wait.

    Who has not asked is not answered either.
    """
    endless = (
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n" % (1 << 30) + b" " * (MAX_BODY_BYTES + 1)
    )

    async def silent(data: bytes, status: int) -> None:
        async with connect(cluster.port) as client:
            await client.send(data)
            shown_status, shown = await client.response()
            assert shown_status == status
            check_shape(shown)
            await client.closed()

    async with (
        asyncio.timeout(20),
        connect(cluster.port) as half_a_body,
        connect(cluster.port) as unused,
        asyncio.TaskGroup() as tasks,
    ):
        await half_a_body.send(post(TEXT, {"prompt": "hi"})[:-5])
        for data, status in ((HEAD, 408), (endless, 413)):
            tasks.create_task(silent(data, status))
        await check_unharmed(cluster)
        assert await unused.reader.read() == b""
    await check_unharmed(cluster)


# --- clients that never read -------------------------------------------------------------------------------


async def test_a_client_that_never_reads_is_cut_off(cluster: Cluster) -> None:
    port = free_port()
    gateway = cluster.start_gateway("gateway-impatient", port, send_timeout_s="1")
    # 20 log probabilities and a text per token: some 1.5 kB, eight times per step.
    body = {"prompt": PROMPT, "n": 8, "logprobs": 20, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{port}"
    async with observe(cluster.nats_url) as observer, httpx.AsyncClient(base_url=url, timeout=60) as http:
        await wait_healthy(http)
        finished = await observer.events("flowkv.v1.event.request_finished.>")
        resident = resident_bytes(gateway)
        async with connect(port, reads=False) as client, asyncio.timeout(60):
            await client.send(post(TEXT, body))
            events = await finished.wait_for_all(8, timeout_s=60)
            await client.closed()
        assert {event["outcome"] for event in events} == {"closed"}
        assert max(event["num_output_tokens"] for event in events) < 500
        assert resident_bytes(gateway) - resident < 16 << 20
        assert "flowkv_gateway_slow_clients_total 1.0" in (await http.get("/metrics")).text
        await observer.wait_idle(NODES)
    assert '"level":"error"' not in gateway.log_path.read_text()
    gateway.stop(10)
    del cluster.processes[gateway.name]


def resident_bytes(process: Process) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES


async def test_nothing_was_harmed(cluster: Cluster) -> None:
    await check_unharmed(cluster)
    for process in cluster.processes.values():
        assert '"level":"error"' not in process.log_path.read_text(errors="replace"), process.name
