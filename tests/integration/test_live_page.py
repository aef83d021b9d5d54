"""What the live page is told is what the bus says; while no page is open nothing is heard."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.config import GatewaySettings
from flowkv_common.wire import subjects
from flowkv_gateway.dispatch import Dispatch
from flowkv_gateway.live import is_wanted
from flowkv_gateway.tokenizer import Tokenizer
from tests.described_nodes import NUM_BLOCKS, TOKEN_BUDGET, ReportingNode
from tests.integration.test_command_trace import EVENT
from tests.live_page import serving_page
from tests.nats_server import NatsServer
from tests.played_cluster import played_cluster, transferred
from tests.waiting import soon, until

Pictures = AsyncIterator[dict[str, Any]]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures come more often than a person wants them."""
    monkeypatch.setattr("flowkv_gateway.live.PERIOD_S", 0.05)


def hears_events(dispatch: Dispatch) -> bool:
    heard = {subscription.subject for subscription in dispatch._bus.nc._subs.values()}
    return subjects.event("*", ">") in heard


@contextlib.asynccontextmanager
async def opened(http: httpx.AsyncClient, **headers: str) -> AsyncIterator[Pictures]:
    """The page's stream, picture by picture."""
    async with http.stream("GET", "/live", headers=headers) as response:
        assert response.status_code == 200

        async def pictures() -> Pictures:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

        yield pictures()


async def first(pictures: Pictures, is_met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async def look() -> dict[str, Any]:
        async for picture in pictures:
            if is_met(picture):
                return picture
        raise AssertionError("the stream has ended")

    return await soon(look(), timeout_s=10)


async def test_a_picture_is_what_the_bus_says(
    bus: Bus, nats_server: NatsServer, tokenizer: Tokenizer
) -> None:
    p0 = ReportingNode(bus, "p0", "prefill", num_links=1, usual_connector="shm", pool="0000", num_prompts=2)
    d0 = ReportingNode(bus, "d0", "decode", num_running=3, free=64)
    moved = transferred(transfer_id="r0.0", total_s=0.5, exposed_s=0.25)
    async with played_cluster(bus, p0, d0), serving_page(nats_server, tokenizer) as served:
        assert not hears_events(served.dispatch)
        served.dispatch.finished.add(EVENT)
        async with opened(served.http) as pictures:
            past = await first(pictures, lambda one: bool(one["requests"]))
            assert [one["id"] for one in past["requests"]] == ["r0"]
            assert sum(span[2] for span in past["requests"][0]["spans"]) == pytest.approx(2.11)
            shown = await first(
                pictures,
                lambda one: one["leader"] == "scheduler-1" and all("budget" in n for n in one["nodes"]),
            )
            assert (shown["regime"], shown["wanted"]) == ("normal", [])
            prefill, decode = shown["nodes"]
            assert (prefill["id"], prefill["serves"], prefill["prompts"]) == ("p0", ["prefill"], 2)
            assert (prefill["budget"], prefill["pool"], prefill["links"]) == (TOKEN_BUDGET, "0000", ["shm"])
            assert (decode["running"], decode["leased"], decode["blocks"]) == (3, NUM_BLOCKS - 64, NUM_BLOCKS)
            await bus.publish(subjects.event("kv_transferred", "r0.0"), moved)
            new = await first(pictures, lambda one: bool(one["transfers"]))
            assert new["transfers"] == [["p0", "d0", 4096, 0.5, "shm"]]
            again = msgspec.structs.replace(EVENT, request_id="r1")  # of another gateway
            await bus.publish(subjects.event("request_finished", "r1"), again)
            new = await first(pictures, lambda one: bool(one["requests"]))
            assert ([one["id"] for one in new["requests"]], new["num_tokens"]) == (["r1"], 4)
            assert hears_events(served.dispatch)
        await until(lambda: not hears_events(served.dispatch))
        told = (await served.http.get("/live/r0")).json()
        assert told["request"]["request_id"] == "r0"
        in_line = [span["took_s"] for span in told["timeline"] if not span["is_beside"]]
        assert sum(in_line) == pytest.approx(2.11)
        assert (await served.http.get("/live/r9")).status_code == 404


async def test_an_open_page_does_not_keep_a_gateway(
    bus: Bus, nats_server: NatsServer, tokenizer: Tokenizer
) -> None:
    async with serving_page(nats_server, tokenizer) as served, opened(served.http) as pictures:
        served.stop.set()
        await soon(_to_the_end(pictures))


async def _to_the_end(pictures: Pictures) -> None:
    async for _ in pictures:
        pass


async def test_where_there_are_keys_the_page_is_for_those_who_have_one(
    nats_server: NatsServer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("me secret\n")
    async with serving_page(nats_server, tokenizer, api_keys_file=str(tmp_path / "keys")) as served:
        page = await served.http.get("/")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (await served.http.get("/live")).status_code == 401
        assert (await served.http.get("/live/r0")).status_code == 401
        async with opened(served.http, authorization="Bearer secret") as pictures:
            assert (await first(pictures, lambda one: True))["requests"] == []


@pytest.mark.parametrize(
    ("host", "setting", "keys", "is_on"),
    [
        ("127.0.0.1", "auto", "", True),
        ("0.0.0.0", "auto", "", False),
        ("0.0.0.0", "auto", "keys", True),
        ("0.0.0.0", "on", "", True),
        ("127.0.0.1", "off", "", False),
    ],
)
def test_it_is_on_where_that_is_safe(host: str, setting: Any, keys: str, is_on: bool) -> None:
    settings = GatewaySettings(model_path="m", host=host, live_page=setting, api_keys_file=keys)
    assert is_wanted(settings) is is_on
