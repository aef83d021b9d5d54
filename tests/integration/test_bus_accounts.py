"""A server with users: strangers get nothing, and a service can't act as another (`accounts.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nats.errors
import pytest
from nats.aio.msg import Msg

from flowkv.accounts import RIGHTS, main, write_accounts
from flowkv.nats_commands import answers
from flowkv_common.aio import running
from flowkv_common.bus.access import Access
from flowkv_common.bus.client import BarrierClient
from flowkv_common.bus.connection import connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Service
from flowkv_common.config import NatsSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.subjects import in_namespace
from tests.nats_server import NatsServer

SERVICES = ("gateway", "scheduler", "node")
PROMPTS = subjects.at(subjects.PREFILL_RUN, "p")
HANDOFFS = subjects.at(subjects.DECODE_RUN, "d")
CAP = subjects.at(subjects.NODE_CAP, "p")
CANCELS = subjects.at(subjects.NODE_CANCEL, "p")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_accounts(tmp_path, "nats:4222")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[NatsServer]:
    with NatsServer("-c", str(folder / "nats" / "nats.conf")) as server:
        yield server


def url_of(server: NatsServer, folder: Path, user: str) -> str:
    """The URL that the user's services read, at this server's address."""
    url = (folder / user / "nats_url").read_text().strip()
    return url.replace("nats:4222", urlsplit(server.url).netloc)


@asynccontextmanager
async def raw(url: str, prefix: str = "_INBOX") -> AsyncIterator[tuple[BarrierClient, list[str]]]:
    """A client that tries what our own would not, and what the server has denied it."""
    denials: list[str] = []

    async def on_error(error: Exception) -> None:
        denials.append(str(error))

    # Its flush ends after all denials have come.
    client = BarrierClient(lambda: None, Access(NatsSettings(nats_url=url)))
    try:
        await client.open(error_cb=on_error, allow_reconnect=False, inbox_prefix=prefix)
        yield client, denials
    finally:
        await client.close()


def test_passwords_are_kept_and_only_their_owner_can_read_them(folder: Path) -> None:
    files = [folder / user / "nats_url" for user in RIGHTS] + [folder / "nats" / "nats.conf"]
    before = [file.read_text() for file in files]
    write_accounts(folder, "nats:4222")
    assert [file.read_text() for file in files] == before
    assert len({urlsplit(text.strip()).password for text in before[:-1]}) == len(RIGHTS)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("user_info", ["", "gateway:wrong@", "stranger:x@"])
async def test_strangers_get_nothing(server: NatsServer, user_info: str) -> None:
    with pytest.raises(nats.errors.Error, match="Authorization"):
        async with raw(f"nats://{user_info}{urlsplit(server.url).netloc}"):
            pass


CAN_HEAR = [
    ("gateway", subjects.tokens("g")),
    ("scheduler", subjects.SCHEDULE),
    ("scheduler", subjects.SCHEDULER_READY),
    ("node", PROMPTS),
    ("node", HANDOFFS),
    ("node", CAP),
    ("node", CANCELS),
]
CAN_SAY = [
    ("gateway", subjects.SCHEDULE),
    ("gateway", subjects.SCHEDULER_READY),
    ("gateway", PROMPTS),
    ("gateway", CANCELS),
    ("scheduler", CAP),
    ("node", HANDOFFS),
    ("node", subjects.load("p")),
    ("node", subjects.tokens("g")),
]
CAN_SAY += [("node", f"$KV.{subjects.NODES_BUCKET}.p"), ("scheduler", f"$KV.{subjects.LEADER_BUCKET}.leader")]


@pytest.mark.parametrize("user", SERVICES)
async def test_a_service_hears_and_says_what_is_its_own(server: NatsServer, folder: Path, user: str) -> None:
    heard, said = set(), set()
    async with raw(url_of(server, folder, user)) as (client, denials):
        for subject in {subject for _, subject in CAN_HEAR}:
            await client.subscribe(subject)
            await client.flush()
            if not denials:
                heard.add((user, subject))
            denials.clear()
        for subject in {subject for _, subject in CAN_SAY}:
            await client.publish(subject, b"{}")
            await client.flush()
            if not denials:
                said.add((user, subject))
            denials.clear()
    assert heard == {pair for pair in CAN_HEAR if pair[0] == user}
    assert said == {pair for pair in CAN_SAY if pair[0] == user}


@pytest.mark.parametrize("user", SERVICES)
async def test_the_answers_to_others_are_not_heard(server: NatsServer, folder: Path, user: str) -> None:
    others = [other for other in SERVICES if other != user]
    for subject in ("_INBOX.>", *(f"_INBOX.{other}.>" for other in others)):
        async with raw(url_of(server, folder, user)) as (client, denials):
            await client.subscribe(subject)
            await client.flush()
            assert denials, subject


async def test_a_question_is_answered_and_heard_by_who_asked(server: NatsServer, folder: Path) -> None:
    async def answer(question: Msg) -> None:
        await question.respond(b"yes")

    answering = raw(url_of(server, folder, "scheduler"), "_INBOX.scheduler")
    asking = connect(url_of(server, folder, "gateway"), name="gateway", user="gateway")
    async with answering as (scheduler, denials), asking as bus:
        await scheduler.subscribe(subjects.SCHEDULE, cb=answer)
        await scheduler.flush()
        answered = await bus.nc.request(subjects.SCHEDULE, b"?", timeout=5)
        assert (answered.data, denials) == (b"yes", [])


async def test_all_services_of_one_process_are_discovered(server: NatsServer, folder: Path) -> None:
    names: asyncio.Queue[str] = asyncio.Queue()

    async def on_reply(reply: Msg) -> None:
        await names.put(json.loads(reply.data)["name"])

    node = connect(url_of(server, folder, "node"), name="node", user="node")
    looking = raw(url_of(server, folder, "operator"), "_INBOX.operator")
    async with node as bus, contextlib.AsyncExitStack() as services, looking as (operator, _):
        for name in ("prefill", "decode", "node"):
            service = Service(bus, name=name, version="1.0.0", service_id="n", endpoints=[])
            await services.enter_async_context(service)
        inbox = operator.new_inbox()
        await operator.subscribe(inbox, cb=on_reply)
        await operator.publish("$SRV.PING", reply=inbox)
        async with asyncio.timeout(5):
            assert {await names.get() for _ in range(3)} == {"prefill", "decode", "node"}


async def test_buckets_work_for_those_who_use_them(server: NatsServer, folder: Path) -> None:
    led, watched = asyncio.Event(), asyncio.Event()

    async def lead() -> None:
        led.set()
        await asyncio.Event().wait()

    async with connect(url_of(server, folder, "scheduler"), name="scheduler", user="scheduler") as bus:
        async with (
            asyncio.timeout(10),
            running(Lease(bus, "s").campaign(lead), watch_nodes(bus, lambda _: watched.set())),
        ):
            await led.wait()
            await watched.wait()


@pytest.mark.parametrize("user", SERVICES)
async def test_users_of_two_namespaces_are_held_apart(tmp_path: Path, user: str) -> None:
    """Each can do in its own what its service needs, and nothing in the other."""
    write_accounts(tmp_path, "nats:4222", namespaces=["flowkv", "team-a"])
    wanted = {  # what each would hear and say, by namespace
        namespace: {
            "heard": {in_namespace(name, namespace) for _, name in CAN_HEAR},
            "said": {
                in_namespace(name.replace("$KV.flowkv", f"$KV.{namespace}"), namespace) for _, name in CAN_SAY
            },
        }
        for namespace in ("flowkv", "team-a")
    }
    with NatsServer("-c", str(tmp_path / "nats" / "nats.conf")) as server:
        for namespace, name in (("flowkv", user), ("team-a", f"team-a-{user}")):
            async with raw(url_of(server, tmp_path, name)) as (client, denials):
                for whose, subjects_of in wanted.items():
                    num_heard = num_said = 0
                    for subject in subjects_of["heard"]:
                        await client.subscribe(subject)
                        await client.flush()
                        num_heard += not denials
                        denials.clear()
                    for subject in subjects_of["said"]:
                        await client.publish(subject, b"{}")
                        await client.flush()
                        num_said += not denials
                        denials.clear()
                    own = whose == namespace
                    assert num_heard == own * sum(each == user for each, _ in CAN_HEAR)
                    assert num_said == own * sum(each == user for each, _ in CAN_SAY)


async def test_a_cluster_works_with_the_users_of_its_namespace(tmp_path: Path) -> None:
    """Lease, registry and services: the operator sees those of its own namespace alone."""
    write_accounts(tmp_path, "nats:4222", namespaces=["flowkv", "2nd-team"])
    with NatsServer("-c", str(tmp_path / "nats" / "nats.conf")) as server:
        for namespace, prefix in (("flowkv", ""), ("2nd-team", "2nd-team-")):
            led, watched = asyncio.Event(), asyncio.Queue[object]()

            def settings_of(user: str, prefix: str = prefix, namespace: str = namespace) -> NatsSettings:
                return NatsSettings(nats_url=url_of(server, tmp_path, f"{prefix}{user}"), namespace=namespace)

            async def lead(led: asyncio.Event = led) -> None:
                led.set()
                await asyncio.Event().wait()

            async with (
                connect(settings_of("scheduler"), name="scheduler", user="scheduler") as bus,
                connect(settings_of("operator"), name="operator", user="operator") as operator,
                Service(bus, name="scheduler", version="1.0.0", service_id="s", endpoints=[]),
                asyncio.timeout(10),
            ):
                async with running(Lease(bus, "s").campaign(lead), watch_nodes(bus, watched.put_nowait)):
                    await led.wait()
                    await watched.get()
                    assert [one["id"] for one in await answers(operator, "INFO")] == ["s"]
                    assert operator.nc.last_error is None


@pytest.mark.parametrize("namespace", ["*", "a.b", ""])
def test_users_of_what_is_no_namespace_are_refused(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["accounts", str(tmp_path / "users"), "--namespace", namespace])
    with pytest.raises(SystemExit):
        main()
    assert f"FLOWKV_NAMESPACE is {namespace!r}" in capsys.readouterr().err
    assert not (tmp_path / "users").exists()
