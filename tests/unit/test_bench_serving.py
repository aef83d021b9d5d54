from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome
from benchmarks.load.summary import Targets
from benchmarks.serving.bare import Bare, Floors
from benchmarks.serving.loop import Load, RequestFailed, figures, run
from benchmarks.serving.report import Run, table


def outcome(*times_s: float, ended_s: float) -> Outcome:
    made = Outcome(Arrival(0.0, 5, len(times_s)), 0.0, status=200, finish_reason="length", ended_s=ended_s)
    made.event_times_s = list(times_s)
    made.token_ids = list(range(len(times_s)))
    return made


def test_figures_follow_the_definitions() -> None:
    outcomes = [outcome(0.5, 0.6, 0.9, ended_s=1.0), outcome(2.0, 2.1, 2.2, ended_s=2.5)]
    found = figures(outcomes, Targets(ttft_s=1.0, tpot_s=0.25), duration_s=2.0)
    assert found.output_tokens_per_s == 3.0
    assert found.goodput_per_s == 0.5  # the second came too late
    assert (found.ttft.p50, found.ttft.max) == (0.5, 2.0)
    assert (found.itl.num, found.itl.max) == (4, pytest.approx(0.3))
    assert found.tpot.max == pytest.approx(0.2)
    assert found.e2e.max == 2.5
    text = table([Run("flowkv", Load(2, 5, 3, 2), 0, found, {"gateway": 0.25, "scheduler-0": 0.5})], None)
    assert "2 clients x 5+3" in text
    assert "gateway 0.25, scheduler 0.50" in text
    assert "bare" in table([], Floors(12.5, [Bare("2 clients x 5+3", 10.0, 5.0)]))


async def test_a_closed_loop_never_has_more_requests_than_clients() -> None:
    running = most = served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most, served
        head = await reader.readuntil(b"\r\n\r\n")
        running, served = running + 1, served + 1
        most = max(most, running)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        await asyncio.sleep(0)
        event = {"choices": [{"token_ids": [1] * body["max_tokens"], "finish_reason": "length"}]}
        data = f"data: {json.dumps(event)}\n\n".encode()
        running -= 1
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with asyncio.timeout(20), server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found = await run(url, Load(3, 5, 4, 10), Targets(1.0, 1.0), seed=0)
        assert found.ttft.num == served == 10
        assert most <= 3

    with pytest.raises(RequestFailed, match="2 clients"):
        await run(url, Load(2, 5, 4, 2), Targets(1.0, 1.0), seed=0)  # nobody listens any more
