"""Services on a real server: answers, errors, limits, draining, and what `nats micro` sees."""

from __future__ import annotations

import asyncio
import json

import pytest
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from flowkv_common import errors
from flowkv_common.bus import service as service_module
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.wire.messages import Accepted, Cancel, Message, Release, Reserve, encode
from flowkv_common.wire.nodes import Drain
from tests.nats_server import NatsServer

SUBJECT = "flowkv.v1.decode.release.d0"


def service(bus: Bus, *endpoints: Endpoint, drain_timeout_s: float = 5.0) -> Service:
    return Service(
        bus,
        name="decode",
        version="1.2.3",
        service_id="d0",
        metadata=lambda: {"role": "decode"},
        endpoints=endpoints,
        drain_timeout_s=drain_timeout_s,
    )


async def accept(message: Message) -> Accepted:
    return Accepted(node_id="d0")


def release(name: str = "r.1") -> Release:
    return Release(transfer_id=name, token="t")


async def ask(bus: Bus) -> Accepted:
    return await bus.request(SUBJECT, release(), Accepted, timeout_s=5)


class Gate:
    """A handler that waits at a gate and tells how many stand there."""

    def __init__(self, expected: int) -> None:
        self.num_waiting = 0
        self.expected = expected
        self.all_here = asyncio.Event()
        self.open = asyncio.Event()

    async def handle(self, message: Release) -> Accepted:
        self.num_waiting += 1
        if self.num_waiting == self.expected:
            self.all_here.set()
        await self.open.wait()
        return Accepted(node_id="d0")


async def test_handlers_of_one_endpoint_run_at_the_same_time(nats_server: NatsServer) -> None:
    gate = Gate(expected=100)
    async with connect(nats_server.url, name="test") as bus, asyncio.timeout(10):
        async with service(bus, Endpoint(SUBJECT, Release, gate.handle)):
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(ask(bus)) for _ in range(100)]
                await gate.all_here.wait()
                gate.open.set()
    assert [task.result() for task in asked] == [Accepted(node_id="d0")] * 100


async def test_over_the_limit_is_refused_at_once(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_RUNNING", 2)
    gate = Gate(expected=2)
    async with connect(nats_server.url, name="test") as bus, asyncio.timeout(10):
        async with service(bus, Endpoint(SUBJECT, Release, gate.handle)):
            async with asyncio.TaskGroup() as tasks:
                for _ in range(2):
                    tasks.create_task(ask(bus))
                await gate.all_here.wait()
                with pytest.raises(errors.Full):
                    await ask(bus)
                gate.open.set()
            assert await ask(bus) == Accepted(node_id="d0")


async def test_error_of_a_handler_arrives_as_the_same_class(nats_server: NatsServer) -> None:
    async def refuse(message: Release) -> Accepted:
        raise errors.Full("no blocks", field="prompt", retry_after_s=1.5)

    async with connect(nats_server.url, name="test") as bus:
        async with service(bus, Endpoint(SUBJECT, Release, refuse)):
            with pytest.raises(errors.Full, match="no blocks") as caught:
                await ask(bus)
    assert caught.value.field == "prompt"
    assert caught.value.retry_after_s == 1.5


async def test_unexpected_exception_is_logged_and_answered(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def crash(message: Release) -> Accepted:
        raise ZeroDivisionError("on purpose")

    async with connect(nats_server.url, name="test") as bus:
        async with service(bus, Endpoint(SUBJECT, Release, crash)):
            with pytest.raises(errors.Internal) as caught:
                await ask(bus)
    assert "on purpose" not in caught.value.message
    assert "ZeroDivisionError: on purpose" in caplog.text


async def test_too_large_answer_is_an_error_not_silence(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:

        async def huge(message: Release) -> Drain:
            return Drain(reason="x" * bus.nc.max_payload)

        async with service(bus, Endpoint(SUBJECT, Release, huge)):
            with pytest.raises(errors.TooLarge):
                await ask(bus)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"{", None),
        (b'{"type": "Reserve"}', "transfer_id"),
        (b'{"type": "Reserve", "transfer_id": 7}', "transfer_id"),
        (b'{"type": "Reserve", "transfer_id": "r"}', "transfer_id"),
        (b'{"type": "Reserve", "transfer_id": "r.0", "node": {"node_id": "d0"}}', "node.incarnation"),
        (encode(Cancel(transfer_id="r.1", reason="")), "type"),
        (b'{"type": "Reserve", "transfer_id": "\xff"}', None),
    ],
)
async def test_bad_payload_is_a_bad_request_naming_the_field(
    nats_server: NatsServer, payload: bytes, field: str | None
) -> None:
    async with connect(nats_server.url, name="test") as bus:
        async with service(bus, Endpoint(SUBJECT, Reserve, accept)):
            reply = await bus.nc.request(SUBJECT, payload, timeout=5)
    refusal = json.loads(reply.data)
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "400"
    assert refusal["code"] == 400
    assert refusal.get("field") == field


async def test_every_request_accepted_before_the_stop_is_answered(nats_server: NatsServer) -> None:
    """Five hundred requests are under way when the service stops: each is answered or was never taken."""
    num_handled = 0
    some_are_in = asyncio.Event()

    async def work(message: Release) -> Accepted:
        nonlocal num_handled
        some_are_in.set()
        await asyncio.sleep(0.02)
        num_handled += 1
        return Accepted(node_id="d0")

    async with (
        connect(nats_server.url, name="server") as server,
        connect(nats_server.url, name="c") as client,
    ):
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            async with service(server, Endpoint(SUBJECT, Release, work)):
                asked = [tasks.create_task(_outcome(client)) for _ in range(500)]
                await some_are_in.wait()
    outcomes = [task.result() for task in asked]
    assert set(outcomes) <= {"answered", "nobody listens"}
    assert outcomes.count("answered") == num_handled > 0


async def _outcome(bus: Bus) -> str:
    try:
        await bus.request(SUBJECT, release(), Accepted, timeout_s=10)
    except errors.Unavailable as error:
        return "nobody listens" if "nobody listens" in error.message else error.message
    return "answered"


async def test_request_cut_by_the_stop_is_told_so(nats_server: NatsServer) -> None:
    gate = Gate(expected=1)
    async with connect(nats_server.url, name="test") as bus, asyncio.timeout(10):
        async with asyncio.TaskGroup() as tasks:
            async with service(bus, Endpoint(SUBJECT, Release, gate.handle), drain_timeout_s=0.05):
                asked = tasks.create_task(_outcome(bus))
                await gate.all_here.wait()
    assert asked.result() == "d0 is stopping"


async def test_error_in_the_body_leaves_as_itself(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        with pytest.raises(KeyError):
            async with service(bus, Endpoint(SUBJECT, Release, accept)):
                raise KeyError("body")


@pytest.mark.parametrize("suffix", ["", ".decode", ".decode.d0"])
async def test_discovery_is_what_the_official_client_reads(nats_server: NatsServer, suffix: str) -> None:
    async with connect(nats_server.url, name="test") as bus:
        async with service(bus, Endpoint(SUBJECT, Release, accept)):
            await ask(bus)
            with pytest.raises(errors.BadRequest):
                await bus.request(SUBJECT, Drain(), Accepted, timeout_s=5)
            answers = {
                verb: json.loads((await bus.nc.request(f"$SRV.{verb}{suffix}", b"", timeout=5)).data)
                for verb in ("PING", "INFO", "STATS")
            }
    ping = ServicePing.from_dict(answers["PING"])
    info = ServiceInfo.from_dict(answers["INFO"])
    stats = ServiceStats.from_dict(answers["STATS"])
    for answer in (ping, info, stats):
        assert (answer.name, answer.id, answer.version) == ("decode", "d0", "1.2.3")
        assert answer.metadata == {"role": "decode"}
    assert [verb["type"] for verb in answers.values()] == [
        f"io.nats.micro.v1.{verb}_response" for verb in ("ping", "info", "stats")
    ]
    assert isinstance(info.description, str)
    assert [(e.name, e.subject) for e in info.endpoints] == [("release", SUBJECT)]
    assert [(e.num_requests, e.num_errors) for e in stats.endpoints] == [(2, 1)]
    assert str(stats.endpoints[0].last_error).startswith("400")
    assert isinstance(stats.endpoints[0].processing_time, int)
    assert stats.endpoints[0].processing_time > 0


async def endpoints_shown(bus: Bus) -> list[tuple[str, int]]:
    """Name and number of requests of each."""
    answer = await bus.nc.request("$SRV.STATS.decode.d0", b"", timeout=5)
    return [(one["name"], one["num_requests"]) for one in json.loads(answer.data)["endpoints"]]


async def test_one_more_endpoint_comes_and_goes_with_its_context(nats_server: NatsServer) -> None:
    gate = Gate(expected=1)
    async with connect(nats_server.url, name="test") as bus, service(bus) as served:
        assert await endpoints_shown(bus) == []
        with pytest.raises(errors.Unavailable, match="nobody listens"):
            await ask(bus)
        async with served.also_serving(Endpoint(SUBJECT, Release, gate.handle)):
            in_hand = asyncio.create_task(ask(bus))
            async with asyncio.timeout(5):
                await gate.all_here.wait()
            assert await endpoints_shown(bus) == [("release", 1)]
        assert await endpoints_shown(bus) == []
        with pytest.raises(errors.Unavailable, match="nobody listens"):
            await ask(bus)
        gate.open.set()
        assert await in_hand == Accepted(node_id="d0")  # what was in hand is still answered


async def test_metadata_may_change_while_it_serves(nats_server: NatsServer) -> None:
    state = "standby"
    async with connect(nats_server.url, name="test") as bus:
        async with Service(
            bus,
            name="scheduler",
            version="0.1.0",
            service_id="s",
            endpoints=[],
            metadata=lambda: {"state": state},
        ):
            for state in ("standby", "leader"):
                answer = await bus.nc.request("$SRV.PING.scheduler.s", b"", timeout=5)
                assert json.loads(answer.data)["metadata"] == {"state": state}


async def test_version_must_be_semver(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        with pytest.raises(ValueError, match="semver"):
            Service(bus, name="decode", version="0.1.0.dev1", service_id="d0", endpoints=[])
