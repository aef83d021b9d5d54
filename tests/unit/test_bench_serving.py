from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import BenchmarkFailed
from benchmarks.load import summarize
from benchmarks.serving import Load, medians, run_load
from flowkv.bench.load import Arrival, Lengths, Outcome
from flowkv.bench.traces import Targets


def outcome(*times_s: float, ended_s: float) -> Outcome:
    made = Outcome(Arrival(0.0, 5, len(times_s)), 0.0, status=200, finish_reason="length", ended_s=ended_s)
    made.event_times_s = list(times_s)
    made.token_ids = list(range(len(times_s)))
    return made


def test_figures_follow_the_definitions() -> None:
    outcomes = [outcome(0.5, 0.6, 0.9, ended_s=1.0), outcome(2.0, 2.1, 2.2, ended_s=2.5)]
    found = summarize(outcomes, Targets(ttft_s=1.0, tpot_s=0.25), duration_s=2.0)
    assert found["output_tokens_per_s"] == 3.0
    assert found["goodput_per_s"] == 0.5  # the second came too late
    assert (found["ttft_s"].p50, found["ttft_s"].max) == (0.5, 2.0)
    assert (found["itl_s"].num, found["itl_s"].max) == (4, pytest.approx(0.3))
    assert found["tpot_s"].max == pytest.approx(0.2)
    assert found["e2e_s"].max == 2.5


def test_a_table_has_the_medians_of_the_rounds() -> None:
    target, title = Targets(ttft_s=1.0, tpot_s=0.25), Load(2, Lengths(5, 3), 2).title
    rounds = [summarize([outcome(at, at + 0.1, ended_s=at + 1)], target, duration_s=2.0) for at in (1, 2, 9)]
    rows = [
        {"server": "flowkv", "load": title, **found, "service_cpu": {"gateway": cpu}}
        for found, cpu in zip(rounds, (0.1, 0.3, 0.2), strict=True)
    ]
    rows.append({"server": "vllm", "load": title, **rounds[0], "service_cpu": {}})
    ours, theirs = medians(rows)
    assert (ours["load"], ours["server"], theirs["server"]) == ("2 clients x 5+3", "flowkv", "vllm")
    assert (ours["TTFT p50"], ours["gateway"], theirs["TTFT p50"]) == (2000, 0.2, 1000)
    assert ours.keys() == theirs.keys()


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
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with asyncio.timeout(20), server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found = await run_load(url, Load(3, Lengths(5, 4), 10), Targets(1.0, 1.0), seed=0)
        assert found["ttft_s"].num == served == 10
        assert most <= 3

    with pytest.raises(BenchmarkFailed, match="0 of 4 tokens"):
        await run_load(url, Load(2, Lengths(5, 4), 2), Targets(1.0, 1.0), seed=0)  # nobody listens any more
