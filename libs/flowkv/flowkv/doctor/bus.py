"""NATS: is it there, does it let us in, can it do what FlowKV needs? Asked on a bare socket.

A client library tries again until it is let in; here the server's first refusal is the answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import nats.errors
from nats.js.errors import NotFoundError

from flowkv.doctor import Finding, bad, good, look
from flowkv.local_cluster import OLDEST_NATS
from flowkv_common.bus.access import Access, Login
from flowkv_common.bus.connection import Bus
from flowkv_common.wire import subjects
from flowkv_common.wire.limits import MAX_PAYLOAD_BYTES, window_that_fits

TIMEOUT_S = 2.0
NATS_DEFAULT_PAYLOAD = 1 << 20
START_IT = "start one (`flowkv up`, or `nats-server -js`), or say where it is: --nats URL or FLOWKV_NATS_URL"
OPERATOR_URL = "in Compose the operator's: docs/compose.md#as-operator says how to print it"


class Server(NamedTuple):
    """What a server has told. `refusal` is empty if it lets us in."""

    where: str
    info: dict[str, Any]
    refusal: str = ""

    @property
    def max_payload(self) -> int:
        return int(self.info.get("max_payload", NATS_DEFAULT_PAYLOAD))


def ask_server(access: Access) -> Server:
    """Of several, the first that answers. Raises OSError if none does."""
    *others, last = zip(*access.read_servers(), strict=True)
    for url, login in others:
        try:
            return _ask(url, login, access)
        except OSError:
            continue
    return _ask(*last, access)


def _ask(url: str, login: Login, access: Access) -> Server:
    address = urlsplit(url)
    where, tls = address.netloc, access.read_tls()
    with socket.create_connection((address.hostname, address.port), TIMEOUT_S) as connection:
        first = _read_line(connection)
        if not first.startswith("INFO "):
            raise OSError(f"what listens at {where} is no NATS server")
        info: dict[str, Any] = json.loads(first.removeprefix("INFO "))
        if access.nats.nats_credentials:  # they sign what the server says: left to the client
            return Server(where, info)
        if not (info.get("tls_required") or tls):
            return Server(where, info, _introduce(connection, login))
        try:
            tls = tls or ssl.create_default_context()
            with tls.wrap_socket(connection, server_hostname=address.hostname) as encrypted:
                return Server(where, info, _introduce(encrypted, login))
        except ssl.SSLError as error:
            return Server(where, info, str(error))


def _introduce(connection: socket.socket, login: Login) -> str:
    """Why it does not let us in; empty if it does."""
    who = {"user": login.user, "pass": login.password, "auth_token": login.token}
    hello = {"verbose": False, "pedantic": False, "name": "flowkv-doctor"}
    hello |= {name: value for name, value in who.items() if value is not None}
    connection.sendall(b"CONNECT " + msgspec.json.encode(hello) + b"\r\nPING\r\n")
    answer = _read_line(connection).strip()
    return "" if answer == "PONG" else answer.removeprefix("-ERR ")


def _read_line(connection: socket.socket) -> str:
    """Not a byte more: what follows may be TLS."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line.decode(errors="replace")


def check_server(server: Server) -> Iterator[Finding]:
    version = re.match(r"(\d+)\.(\d+)", str(server.info.get("version", "")))
    if version and (int(version[1]), int(version[2])) < OLDEST_NATS:
        oldest = ".".join(map(str, OLDEST_NATS))
        yield bad("NATS", f"{server.where} is version {server.info['version']}", f"upgrade it to {oldest}")
    else:
        yield good("NATS", f"version {server.info.get('version')} at {server.where}")
    if server.refusal:
        has_user = "these credentials" if server.info.get("auth_required") else "this connection"
        mend = f"give the right user and password: nats://USER:PASSWORD@{server.where}; {OPERATOR_URL}"
        if server.info.get("tls_required"):
            mend = "look at FLOWKV_NATS_CA, FLOWKV_NATS_CERT and FLOWKV_NATS_KEY: docs/operations.md#encrypt"
        yield bad("NATS", f"it refuses {has_user}: {server.refusal}", mend)
    if not server.info.get("jetstream"):
        mend = "start it as `nats-server -js`, or put `jetstream: {}` into its configuration"
        yield bad("NATS", "JetStream is off, where FlowKV keeps its nodes and its leader", mend)
    if server.max_payload < NATS_DEFAULT_PAYLOAD:
        said = f"messages carry {server.max_payload} bytes, prompts up to some "
        said += f"{window_that_fits(server.max_payload, 16)} tokens"
        yield bad("NATS", said, payload_mend())


def check_rights(user: str | None, last_error: object) -> Iterator[Finding]:
    """`last_error` is what the server last told this connection."""
    if "permissions violation" in str(last_error).lower():
        said = f"the user {user} may not hear or say all that is looked at here: {last_error}"
        yield look("NATS", said, f"use a user that may: {OPERATOR_URL}")


async def check_buckets(bus: Bus) -> list[Finding]:
    """Whether the death of one server of several would take what services keep there."""
    findings = []
    for bucket in map(bus.full_name, (subjects.NODES_BUCKET, subjects.LEADER_BUCKET)):
        try:
            async with asyncio.timeout(TIMEOUT_S):
                info = await bus.jetstream().stream_info(f"KV_{bucket}")
        except NotFoundError:
            continue  # no service has made it
        except (TimeoutError, nats.errors.Error) as error:
            said = f"{bucket}: no server that keeps it leads the others: {str(error) or 'no answer'}"
            mend = "most of those that keep it must run: wait 10 s, then look at each server's /healthz"
            findings.append(bad("NATS", said, mend))
            continue
        others = (info.cluster.replicas if info.cluster else None) or []
        late = [str(one.name) for one in others if one.offline or not one.current]
        if late:
            said = f"{bucket}: {', '.join(late)} of the servers that keep it is away, or not up to date"
            findings.append(look("NATS", said, "stop no other server before its /healthz says ok"))
        elif others:
            findings.append(good("NATS", f"{bucket} is kept by {1 + len(others)} servers"))
        elif bus.nc.has_other_servers:
            said = f"{bucket} is kept by one of several servers, and dies with it"
            findings.append(look("NATS", said, "start all services with FLOWKV_NATS_REPLICAS=3"))
    return findings


def payload_mend() -> str:
    return f"put `max_payload: {MAX_PAYLOAD_BYTES}` into the server's configuration, and start it again"
