"""The health command against a real service's HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from flowkv.local_cluster import free_port
from flowkv_common import telemetry as service_connection
from flowkv_common.health import own_port, problem
from flowkv_common.telemetry import MAX_CONNECTIONS, serve_http, service_app
from tests.waiting import until


async def run_health(*arguments: str, env: Mapping[str, str] = os.environ) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "flowkv_common.health", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=env)
    async with asyncio.timeout(20):
        said, _ = await process.communicate()
    return process.returncode, said.decode().strip()


@pytest.mark.parametrize(("reason", "expected"), [(None, (0, "well")), ("no link", (1, "503: no link"))])
async def test_health_is_what_the_service_says(reason: str | None, expected: tuple[int, str]) -> None:
    async with serve_http(service_app(CollectorRegistry(), lambda: reason), "127.0.0.1", 0) as port:
        assert await run_health(str(port)) == expected
        assert await run_health(str(port), "/health/live") == (0, "well")


async def test_another_host_may_take_its_time() -> None:
    """A question that reaches all nodes takes longer than one of a probe."""
    answer = asyncio.Event()

    async def answer_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer.wait()
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 7\r\n\r\nno pair")
        writer.close()

    async with await asyncio.start_server(answer_late, "127.0.0.2", 0) as server:
        port = str(server.sockets[0].getsockname()[1])
        elsewhere = {**os.environ, "FLOWKV_HOST": "127.0.0.2"}
        assert await run_health(port, "/health/deep", "0.1", env=elsewhere) == (1, "timed out")
        answer.set()
        assert await run_health(port, "/health/deep", "20", env=elsewhere) == (1, "503: no pair")


SERVICE = """
import asyncio, sys
from prometheus_client import CollectorRegistry
from flowkv_common.telemetry import serve_http, service_app

async def serve():
    async with serve_http(service_app(CollectorRegistry(), lambda: None), "127.0.0.1", range(*PORTS)) as port:
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(serve())
"""


async def test_of_a_range_each_service_takes_a_port_and_its_own_health_command_finds_it() -> None:
    """Containers that share the host's network are told apart by their mount namespaces."""
    first = free_port()
    ports = range(first, first + 40)
    program = SERVICE.replace("PORTS", f"({ports.start}, {ports.stop})")
    taken = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            taken.append(int(await asyncio.wait_for(process.stdout.readline(), 20)))
        assert taken == sorted(set(taken)), "each has the first that was free"
        assert own_port(range(taken[1], taken[1] + 1)) == taken[1]
        assert await run_health(f"{taken[0]}-{ports.stop}") == (0, "well")
    code, said = await run_health(f"{taken[0]}-{taken[0] + 1}")
    assert (code, said) == (1, f"nothing of this container listens on a port of {taken[0]}-{taken[0] + 1}")


async def test_idle_connections_are_bounded_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take the descriptors that the node's other sockets need."""
    app = service_app(CollectorRegistry(), lambda: None)
    async with serve_http(app, "127.0.0.1", 0) as port, contextlib.AsyncExitStack() as stack:
        idle = []
        for number in range(2 * MAX_CONNECTIONS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            writer.write(b"GET /health HTTP/1.1\r\n" if number % 2 else b"")
            idle.append(reader)
        assert await run_health(str(port)) == (0, "well")
        await asyncio.wait_for(idle[MAX_CONNECTIONS].read(), 5)  # hers was the place of the last that came
        assert [reader.at_eof() for reader in idle] == [n <= MAX_CONNECTIONS for n in range(len(idle))]

    monkeypatch.setattr(service_connection, "_IDLE_TIMEOUT_S", 0.05)
    async with serve_http(app, "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\n")
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_a_connection_that_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who scrapes on one connection is not cut off by its age, but by its silence."""
    monkeypatch.setattr(service_connection, "_IDLE_TIMEOUT_S", 0.5)
    async with serve_http(service_app(CollectorRegistry(), lambda: None), "127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for _ in range(3):
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ready\n"), 5)
                await asyncio.sleep(0.3)  # it is the time between two scrapes that is tried
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_nobody_there_is_not_well() -> None:
    code, said = await run_health(str(free_port()))
    assert code == 1
    assert "refused" in said


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 503 no\r\ntransfer-encoding: chunked\r\n\r\nff\r\nno l", b"no\r\n"]
)
async def test_one_that_ends_while_it_answers_is_not_well(answer: bytes) -> None:
    """As a node that is killed while it starts: whoever waits for it goes on to wait."""

    async def answer_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(answer_half, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(problem, port, "/health/ready") is not None


async def test_a_server_that_is_cut_off_leaves_nothing_in_the_loop() -> None:
    """What gets the number of its socket next would never be heard."""
    polled: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    before = set(polled.get_map())

    async def serve_and_fail() -> None:
        async with serve_http(service_app(CollectorRegistry(), lambda: None), "127.0.0.1", 0) as port:
            assert await asyncio.to_thread(problem, port, "/health/live") is None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await serve_and_fail()
    await until(lambda: set(polled.get_map()) == before)
