"""`flowkv trace` shows what gateways remember."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import NotFound
from flowkv_common.timeline import timeline
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import FindFinished
from flowkv_gateway.finished import FinishedLog
from tests.nats_server import NatsServer
from tests.played_cluster import run
from tests.unit.test_timeline import DECODE, HANDOFF, PREFILL, finished, told

EVENT = msgspec.structs.replace(
    finished(told(1.1, 1.6, 2.1, times=[PREFILL, HANDOFF, DECODE])), request_id="r0", began_at=1000.0
)


@contextlib.asynccontextmanager
async def gateways(bus: Bus, *logs: FinishedLog) -> AsyncIterator[None]:
    """That remember these, and do nothing else."""
    async with contextlib.AsyncExitStack() as stack:
        for number, log in enumerate(logs):

            async def find(wanted: FindFinished, log: FinishedLog = log) -> msgspec.Struct:
                return log.find(wanted, bus.max_payload)

            endpoint = Endpoint(subjects.FINISHED, FindFinished, find)  # type: ignore[arg-type]
            service = Service(
                bus, name="gateway", version="1.0.0", service_id=f"g{number}", endpoints=[endpoint]
            )
            await stack.enter_async_context(service)
        yield


async def test_one_request_and_the_last_ones_of_all_gateways(
    bus: Bus, nats_server: NatsServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second, nats = FinishedLog("g0"), FinishedLog("g1"), ("--nats", nats_server.url)
    first.add(EVENT)
    second.add(msgspec.structs.replace(EVENT, request_id="r1", began_at=1001.0))
    async with gateways(bus, first, second):
        assert await run("trace", "r0", *nats) == 0
        shown = capsys.readouterr().out
        assert await run("trace", "--json", *nats) == 0
        listed = json.loads(capsys.readouterr().out)
        assert await run("trace", "--last", "1", "--perfetto", str(tmp_path / "trace.json"), *nats) == 0
        with pytest.raises(NotFound, match="no gateway remembers r2"):
            await run("trace", "r2", *nats)
    assert [one["request"]["request_id"] for one in listed] == ["r1", "r0"]
    assert [span["took_s"] for span in listed[1]["timeline"]] == [span.took_s for span in timeline(EVENT)]
    for said in ("the only pair", "hidden, to d by shm", "2110.0", "chunk", "64 tokens"):
        assert said in shown
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline(EVENT))
    assert max(event["ts"] + event["dur"] for event in spans) == 2_110_000
