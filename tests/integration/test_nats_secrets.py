"""Passwords, credentials and certificates that change while services run, and intruders with wrong ones."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from nats.aio.msg import Msg

from flowkv.accounts import write_accounts
from flowkv.authority import make_certificates
from flowkv_common.bus.client import NothingToShow
from flowkv_common.bus.connection import connect
from flowkv_common.config import NatsSettings
from flowkv_common.errors import CannotStart, Unavailable
from tests.echo import ANSWER, SUBJECT, ask, echo
from tests.nats_server import NatsServer
from tests.waiting import reconnected, soon, until


class Accounts:
    """A server with a user per service, whose passwords can be changed as an operator does it."""

    def __init__(self, folder: Path, server: NatsServer) -> None:
        self.folder = folder
        self.server = server

    def write(self, *, is_rotation: bool = False) -> None:
        write_accounts(self.folder, urlsplit(self.server.url).netloc, is_rotation=is_rotation)
        self.server.reload()

    def forget_password(self, service: str) -> None:
        """The server gets another password than the service's file has."""
        with tempfile.TemporaryDirectory() as name:
            other = Path(name)
            shutil.copytree(self.folder, other, dirs_exist_ok=True)
            (other / service / "nats_url").unlink()
            write_accounts(other, urlsplit(self.server.url).netloc)
            shutil.copy(other / "nats" / "nats.conf", self.folder / "nats" / "nats.conf")
        self.server.reload()

    def settings(self, service: str, **others: Any) -> NatsSettings:
        return NatsSettings(nats_url_file=str(self.folder / service / "nats_url"), **others)


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    write_accounts(tmp_path, "nats:4222")
    with NatsServer("-c", str(tmp_path / "nats" / "nats.conf")) as server:
        accounts = Accounts(tmp_path, server)
        accounts.write()
        yield accounts


async def test_a_rotation_is_two_reloads_and_one_reconnect(accounts: Accounts) -> None:
    async with (
        connect(accounts.settings("scheduler"), name="s", user="scheduler") as scheduler,
        connect(accounts.settings("gateway"), name="g", user="gateway") as gateway,
        echo(scheduler),
    ):
        back = [reconnected(scheduler), reconnected(gateway)]
        accounts.write(is_rotation=True)
        assert await ask(gateway) == ANSWER
        assert [bus.nc.stats["reconnects"] for bus in (scheduler, gateway)] == [0, 0]
        accounts.write()
        for each in back:
            await soon(each.wait())
        assert await ask(gateway) == ANSWER  # also the answer's way is open to the new user
        assert [bus.nc.stats["reconnects"] for bus in (scheduler, gateway)] == [1, 1]


async def test_who_was_away_meanwhile_comes_with_the_new_password(accounts: Accounts) -> None:
    async with connect(accounts.settings("gateway"), name="g", user="gateway") as gateway:
        back = reconnected(gateway)
        accounts.server.kill()
        (accounts.folder / "gateway" / "nats_url").unlink()  # a new one is made
        write_accounts(accounts.folder, urlsplit(accounts.server.url).netloc)
        accounts.server.start()
        await soon(back.wait())


async def test_a_file_that_is_gone_for_a_moment_ends_nobody(accounts: Accounts) -> None:
    url_file = accounts.folder / "gateway" / "nats_url"
    async with connect(accounts.settings("gateway"), name="g", user="gateway") as gateway:
        back = reconnected(gateway)
        accounts.forget_password("gateway")
        await until(lambda: not gateway.is_connected)
        url_file.unlink()
        accounts.write()
        await soon(back.wait())


async def test_a_file_that_is_no_text_for_a_moment_ends_nobody(accounts: Accounts) -> None:
    url_file = accounts.folder / "gateway" / "nats_url"
    url = url_file.read_bytes()
    async with connect(accounts.settings("gateway"), name="g", user="gateway") as gateway:
        back = reconnected(gateway)
        url_file.write_bytes(b"\xff\xfe")
        accounts.server.kill()
        await until(lambda: "Connect call failed" in str(gateway.nc.last_error))
        url_file.write_bytes(url)
        accounts.server.start()
        await soon(back.wait())


async def test_who_is_refused_for_good_ends_and_says_why(accounts: Accounts) -> None:
    closed = asyncio.Event()
    settings = accounts.settings("gateway", nats_give_up_s=0.5)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(connect(settings, name="g", user="gateway", on_closed=closed.set))
        accounts.forget_password("gateway")
        await soon(closed.wait())
        with pytest.raises(Unavailable, match="for good: it has refused us for .*Authorization"):
            await stack.aclose()


async def test_a_server_that_is_away_is_waited_for_longer_than_one_that_refuses(accounts: Accounts) -> None:
    settings = accounts.settings("gateway", nats_give_up_s=0.0)
    async with connect(settings, name="g", user="gateway") as gateway:
        back = reconnected(gateway)
        accounts.server.kill()
        await until(lambda: "Connect call failed" in str(gateway.nc.last_error))
        accounts.server.start()
        await soon(back.wait())


@asynccontextmanager
async def scheduler(accounts: Accounts, give_up_s: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """One as a process, which leads; then it is refused."""
    env = {
        **os.environ,
        "FLOWKV_NATS_URL_FILE": str(accounts.folder / "scheduler" / "nats_url"),
        "FLOWKV_NATS_GIVE_UP_S": str(give_up_s),
    }
    command = [sys.executable, "-m", "flowkv_scheduler"]
    process = await asyncio.create_subprocess_exec(*command, env=env, stderr=asyncio.subprocess.PIPE)
    try:
        await read_until(process, b"leads, epoch 1")
        accounts.forget_password("scheduler")
        await read_until(process, b"refuses us")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await soon(process.communicate())


async def read_until(process: asyncio.subprocess.Process, text: bytes) -> None:
    assert process.stderr is not None
    seen = b""
    async with asyncio.timeout(20):
        async for line in process.stderr:
            seen += line
            if text in line:
                return
    raise AssertionError(f"{text!r} was not said: {seen.decode()}")


async def test_a_scheduler_that_is_refused_ends_at_once_when_it_is_told_to(accounts: Accounts) -> None:
    async with scheduler(accounts, give_up_s=600.0) as process:
        process.send_signal(signal.SIGTERM)
        await soon(process.communicate())  # it reads on: the pipe must not fill
        assert process.returncode == 0


async def test_a_scheduler_that_is_refused_for_good_ends_with_an_error(accounts: Accounts) -> None:
    async with scheduler(accounts, give_up_s=0.3) as process:
        await read_until(process, b"scheduler ended: NATS closed the connection for good")
        await soon(process.communicate())
        assert process.returncode == 1


async def test_a_token_is_in_no_subject() -> None:
    with NatsServer("--auth", "t0ken") as server:
        async with connect(server.url.replace("//", "//t0ken@"), name="test", user="gateway") as bus:
            async with echo(bus):
                await ask(bus)
            assert bus.nc.new_inbox().startswith("_INBOX.gateway.")


# --- credentials ------------------------------------------------------------------------------------


class Authority:
    """An operator with one account in NATS's own terms: it signs who a user is, as `nsc` does."""

    def __init__(self) -> None:
        nkeys = pytest.importorskip("nkeys")
        self._nkeys = nkeys
        self._operator = self._key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = self._key(nkeys.PREFIX_BYTE_ACCOUNT)
        limits = {
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True,
            "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
        }  # fmt: skip
        self._operator_jwt = self._signed(self._operator, self._operator, {"type": "operator", "version": 2})
        account = {"type": "account", "version": 2, "limits": limits}
        self._account_jwt = self._signed(self._operator, self._account, account)

    def server_config(self) -> dict[str, Any]:
        account = self._account.public_key.decode()
        return {
            "operator": self._operator_jwt,
            "resolver": "MEMORY",
            "resolver_preload": {account: self._account_jwt},
        }

    def write_user(self, path: Path, lives_s: float) -> None:
        """A `.creds` file of a new user."""
        user = self._key(self._nkeys.PREFIX_BYTE_USER)
        claims = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        jwt = self._signed(self._account, user, claims, expires=int(time.time() + lives_s))
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )

    def _key(self, kind: int) -> Any:
        return self._nkeys.from_seed(self._nkeys.encode_seed(os.urandom(32), kind))

    def _signed(self, issuer: Any, subject: Any, nats: dict[str, Any], expires: int = 0) -> str:
        claims: dict[str, Any] = {
            "iat": int(time.time()),
            "iss": issuer.public_key.decode(),
            "sub": subject.public_key.decode(),
            "name": nats["type"],
            "nats": nats,
        }
        if expires:
            claims["exp"] = expires
        digest = hashlib.new("sha512_256", json.dumps(claims).encode()).digest()
        claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        signed = f"{_base64(msgspec.json.encode(head))}.{_base64(msgspec.json.encode(claims))}"
        return f"{signed}.{_base64(issuer.sign(signed.encode()))}"


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def test_credentials_that_expire_are_read_again(tmp_path: Path) -> None:
    authority = Authority()
    config, creds = tmp_path / "nats.conf", tmp_path / "user.creds"
    config.write_text(json.dumps(authority.server_config()))
    authority.write_user(creds, lives_s=2)
    with NatsServer("-c", str(config), jetstream=False) as server:
        settings = NatsSettings(nats_url=server.url, nats_credentials=str(creds))
        async with connect(settings, name="test", user="gateway") as bus, echo(bus):
            back = reconnected(bus)
            assert await ask(bus) == ANSWER
            authority.write_user(creds, lives_s=3600)
            await soon(back.wait(), 10)
            assert await ask(bus) == ANSWER
        with pytest.raises(Unavailable, match="Authorization"):
            async with connect(server.url, name="stranger", connect_timeout_s=0.5):
                pass


@pytest.mark.parametrize("written", [0, 40, 0.5, 0.9])
async def test_credentials_that_are_half_written_cost_one_attempt(tmp_path: Path, written: float) -> None:
    """`written`: characters of the file, or a share of them."""
    authority = Authority()
    config, creds = tmp_path / "nats.conf", tmp_path / "user.creds"
    config.write_text(json.dumps(authority.server_config()))
    authority.write_user(creds, lives_s=3600)
    whole = creds.read_text()
    with NatsServer("-c", str(config), jetstream=False) as server:
        settings = NatsSettings(nats_url=server.url, nats_credentials=str(creds))
        async with connect(settings, name="test", user="gateway") as bus, echo(bus):
            back = reconnected(bus)
            creds.write_text(whole[: int(written * len(whole)) if written < 1 else int(written)])
            server.restart()
            await until(lambda: isinstance(bus.nc.last_error, NothingToShow))
            creds.write_text(whole)
            await soon(back.wait())
            assert await ask(bus) == ANSWER


async def test_the_seed_of_an_nkey_is_read_again(tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys")
    config, seed_file = tmp_path / "nats.conf", tmp_path / "seed"
    with contextlib.ExitStack() as running:

        def change_seed() -> None:
            seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
            seed_file.write_bytes(seed)
            users = [{"nkey": nkeys.from_seed(bytearray(seed)).public_key.decode()}]
            config.write_text(json.dumps({"authorization": {"users": users}}))

        change_seed()
        server = running.enter_context(NatsServer("-c", str(config), jetstream=False))
        settings = NatsSettings(nats_url=server.url, nats_credentials=str(seed_file))
        async with connect(settings, name="test", user="gateway") as bus, echo(bus):
            back = reconnected(bus)
            change_seed()
            server.reload()
            await soon(back.wait(), 10)
            assert await ask(bus) == ANSWER


# --- certificates -----------------------------------------------------------------------------------


class Certified:
    """A server that knows services by their certificates alone."""

    def __init__(self, accounts: Path, certificates: Path, server: NatsServer) -> None:
        self._accounts = accounts
        self.certificates = certificates
        self.server = server

    def settings(self, service: str, certificate: Path | None = None, **others: Any) -> NatsSettings:
        """As `service` has them; `certificate`: the folder with its certificate, if it is another one."""
        folder = certificate or self.certificates
        return NatsSettings(
            nats_url=self.server.url.replace("nats:", "tls:"),
            nats_ca=str(self.certificates / "ca.pem"),
            nats_cert=str(folder / f"{service}.pem"),
            nats_key=str(folder / f"{service}.key"),
            **others,
        )


@pytest.fixture
def certified(tmp_path: Path) -> Iterator[Certified]:
    certificates = tmp_path / "certificates"
    make_certificates(certificates)
    write_accounts(tmp_path, "localhost:4222", certificates=certificates)
    with NatsServer("-c", str(tmp_path / "nats" / "nats.conf")) as server:
        yield Certified(tmp_path, certificates, server)


async def test_services_are_known_by_their_certificates(certified: Certified) -> None:
    async with (
        connect(certified.settings("scheduler"), name="s", user="scheduler") as scheduler,
        connect(certified.settings("gateway"), name="g", user="gateway") as gateway,
        echo(scheduler),
    ):
        assert await ask(gateway) == ANSWER
        assert gateway.nc._transport is not None


async def test_an_intruder_without_a_certificate_gets_nothing(certified: Certified) -> None:
    bare = NatsSettings(
        nats_url=certified.server.url.replace("nats:", "tls:"),
        nats_ca=str(certified.certificates / "ca.pem"),
    )
    with pytest.raises(Unavailable):
        async with connect(bare, name="x", user="gateway", connect_timeout_s=1.0):
            pass


async def test_an_intruder_with_a_certificate_of_another_authority_gets_nothing(
    certified: Certified, tmp_path: Path
) -> None:
    make_certificates(tmp_path / "others")
    settings = certified.settings("gateway", tmp_path / "others")
    with pytest.raises(Unavailable):
        async with connect(settings, name="x", user="gateway", connect_timeout_s=1.0):
            pass


async def test_a_service_is_no_other_one_by_saying_so(certified: Certified) -> None:
    """With a gateway's certificate it hears no asks for the scheduler, and no answers to it."""
    async with connect(certified.settings("gateway"), name="x", user="scheduler") as bus:
        async with await bus.subscribe_raw(SUBJECT, _ignore):
            await until(lambda: "permissions violation" in str(bus.nc.last_error).lower())
            assert SUBJECT in str(bus.nc.last_error)
    async with connect(certified.settings("gateway"), name="x", user="scheduler") as bus:
        async with await bus.subscribe_raw("_INBOX.scheduler.>", _ignore):
            await until(lambda: "_inbox.scheduler" in str(bus.nc.last_error).lower())


async def _ignore(_: Msg) -> None: ...


async def test_a_server_of_another_authority_gets_no_connection(certified: Certified, tmp_path: Path) -> None:
    make_certificates(tmp_path / "others")
    settings = msgspec.structs.replace(
        certified.settings("gateway"), nats_ca=str(tmp_path / "others" / "ca.pem")
    )
    with pytest.raises(Unavailable, match="certificate verify failed"):
        async with connect(settings, name="x", connect_timeout_s=1.0):
            pass


async def test_a_server_without_tls_gets_no_password(
    nats_server: NatsServer, certified: Certified, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(
        certified.settings("gateway"), nats_url=nats_server.url.replace("//", "//me:secret@")
    )
    with pytest.raises(Unavailable, match="has no TLS"):
        async with connect(settings, name="x", connect_timeout_s=1.0):
            pass


async def test_a_renewed_certificate_counts_with_the_next_connection(certified: Certified) -> None:
    async with (
        connect(certified.settings("scheduler"), name="s", user="scheduler") as scheduler,
        connect(certified.settings("gateway"), name="g", user="gateway") as gateway,
        echo(scheduler),
    ):
        back = [reconnected(scheduler), reconnected(gateway)]
        (certified.certificates / "ca.pem").unlink()  # another authority, so that old ones are worth nothing
        make_certificates(certified.certificates)
        certified.server.restart()
        for each in back:
            await soon(each.wait())
        assert await ask(gateway) == ANSWER


async def test_a_certificate_file_that_is_missing_is_said_at_once(certified: Certified) -> None:
    settings = msgspec.structs.replace(certified.settings("gateway"), nats_cert="/no/such.pem")
    with pytest.raises(CannotStart, match="No such file"):
        async with connect(settings, name="x"):
            pass
