"""`flowkv doctor` against real NATS servers: what is wrong with them, and a real request's proof."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from flowkv_common.bus.connection import Bus, connect
from flowkv_common.wire import subjects
from flowkv_common.wire.deep_health import DeepHealth, TriedPair
from flowkv_common.wire.messages import RequestFinished, encode
from tests.described_nodes import ReportingNode
from tests.nats_server import NatsServer
from tests.played_cluster import played_cluster, run, transferred

Captured = pytest.CaptureFixture[str]
OURS = ("NATS", "nodes", "links", "clocks", "a request", "pairs")  # not this host


async def findings(url: str, capsys: Captured, *arguments: str) -> dict[str, str]:
    """What it says that is not good of all but this host, each with what mends it."""
    status = await run("doctor", "--nats", url, "--json", *arguments)
    found = json.loads(capsys.readouterr().out)["findings"]
    assert status == any(one["level"] == "bad" for one in found)
    ours = [one for one in found if one["about"] in OURS]
    return {one["said"]: one.get("mend", "") for one in ours if one["level"] != "good"}


async def test_no_nats_at_all(capsys: Captured) -> None:
    [(said, mend)] = (await findings("nats://me:secret@127.0.0.1:1", capsys)).items()
    assert "nobody answers at 127.0.0.1:1" in said
    assert "flowkv up" in mend


async def test_a_wrong_password(capsys: Captured) -> None:
    with NatsServer("--user", "me", "--pass", "right") as server:
        [(said, mend)] = (await findings(server.url.replace("//", "//me:wrong@"), capsys)).items()
    assert "Authorization Violation" in said
    assert "user and password" in mend


async def test_no_jetstream(capsys: Captured) -> None:
    with NatsServer(jetstream=False) as server:
        [(said, mend)] = (await findings(server.url, capsys)).items()
    assert "JetStream is off" in said
    assert "nats-server -js" in mend


async def test_a_payload_that_is_too_small(capsys: Captured) -> None:
    with NatsServer(max_payload=100_000) as server:
        async with connect(server.url, name="test") as bus:
            nodes = (ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode"))
            async with played_cluster(bus, *nodes):
                found = await findings(server.url, capsys, "--no-request")
    [mend] = [mend for said, mend in found.items() if "messages carry 100000 bytes" in said]
    assert "max_payload" in mend


async def test_a_clock_of_this_host_that_is_a_day_off(
    bus: Bus, nats_server: NatsServer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    async with played_cluster(bus, ReportingNode(bus, "p0", "prefill")):
        monkeypatch.setattr("flowkv.doctor.host.time.time", lambda: right() + 86400.0)
        found = await findings(nats_server.url, capsys, "--no-request")
    assert any(said.startswith("that of the NATS server is 86") for said in found)


@contextmanager
def api(bus: Bus, tell: list[tuple[str, bytes]], pairs: list[TriedPair] | None = None) -> Iterator[str]:
    """The URL of an API that answers each request with the id `cmpl-1`, and tells the bus of it.

    `pairs` are those of its deep health; None: it is older, and has none.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            for one in tell:
                loop.call_soon_threadsafe(publish, *one)
            self._answer(200, b'{"id": "cmpl-1"}')

        def do_GET(self) -> None:
            if self.path != "/health/deep" or pairs is None:
                self._answer(404, b'{"error": {"message": "Not Found"}}')
            else:
                health = DeepHealth(ok=False, why_not=None, age_s=0.0, num_pairs=len(pairs), pairs=pairs)
                self._answer(503, msgspec.json.encode(health))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    loop = asyncio.get_running_loop()
    tasks = set()

    def publish(subject: str, payload: bytes) -> None:
        tasks.add(loop.create_task(bus.nc.publish(subject, payload)))

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def finished(decode_node: str) -> tuple[str, bytes]:
    event = RequestFinished(
        request_id="cmpl-1",
        attempts=1,
        outcome="length",
        num_prompt_tokens=40,
        num_output_tokens=4,
        num_cached_tokens=0,
        prefill_node="p0",
        decode_node=decode_node,
        phases_s={"ttft": 0.25},
    )
    return subjects.event("request_finished", "cmpl-1"), encode(event)


TRANSFERRED = transferred()


@pytest.mark.parametrize(("decode_node", "said"), [("d0", "4096 bytes of KV by shm"), ("p0", "no KV moved")])
async def test_a_request_shows_where_it_ran(
    decode_node: str, said: str, bus: Bus, nats_server: NatsServer, capsys: Captured
) -> None:
    linked = {"num_links": 1, "usual_connector": "shm"}
    nodes = [ReportingNode(bus, "p0", "prefill", **linked), ReportingNode(bus, "d0", "decode", **linked)]
    moved = (subjects.event("kv_transferred", "cmpl-1.0"), encode(TRANSFERRED))
    tell = [moved, finished(decode_node)] if decode_node == "d0" else [finished(decode_node)]
    with api(bus, tell) as url:
        async with played_cluster(bus, *nodes, url=url):
            await run("doctor", "--nats", nats_server.url)
    shown = capsys.readouterr().out
    [line] = [line for line in shown.splitlines() if "a request:" in line]
    assert said in line
    assert line.startswith("ok" if decode_node == "d0" else "look")


@pytest.mark.parametrize("has_failed", [True, False])
async def test_pairs_are_tried(has_failed: bool, bus: Bus, nats_server: NatsServer, capsys: Captured) -> None:
    linked = {"num_links": 1, "usual_connector": "shm"}
    nodes = [ReportingNode(bus, "p0", "prefill", **linked), ReportingNode(bus, "d0", "decode", **linked)]
    moved = (subjects.event("kv_transferred", "cmpl-1.0"), encode(TRANSFERRED))
    good = TriedPair(prefill="p0", decode="d0", ok=True, ms=61.2)
    bad = TriedPair(prefill="p0", decode="d1", ok=False, ms=3.0, error="d1: no link")
    with api(bus, [moved, finished("d0")], [good, bad] if has_failed else [good]) as url:
        async with played_cluster(bus, *nodes, url=url):
            status = await run("doctor", "--nats", nats_server.url, "--json")
    found = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["about"] == "pairs"]
    if has_failed:
        assert status == 1
        assert [(one["level"], one["said"]) for one in found] == [("bad", "p0 to d1: d1: no link")]
        assert "flowkv cordon" in found[0]["mend"]
    else:
        assert [one["said"] for one in found] == ["1 of 1 answer, the slowest in 61 ms (p0 to d0)"]
