"""NATS: is it there, does it let us in, can it do what FlowKV needs? Asked on a bare socket.

A client library tries again until it is let in; here the server's first refusal is the answer.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from flowkv.doctor import Finding, bad, good, look
from flowkv.local_cluster import OLDEST_NATS
from flowkv_common.wire.messages import MAX_PAYLOAD_BYTES, window_that_fits

TIMEOUT_S = 2.0
DEFAULT_PORT = 4222
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


def ask_server(url: str) -> Server:
    """Of several with commas between, the first that answers. Raises OSError if none does."""
    *others, last = (urlsplit(one if "//" in one else f"nats://{one}") for one in url.split(","))
    for each in others:
        try:
            return _ask(each)
        except OSError:
            continue
    return _ask(last)


def _ask(url: SplitResult) -> Server:
    where = f"{url.hostname}:{url.port or DEFAULT_PORT}"
    with socket.create_connection((url.hostname, url.port or DEFAULT_PORT), TIMEOUT_S) as connection:
        lines = connection.makefile("rb")
        first = lines.readline().decode(errors="replace")
        if not first.startswith("INFO "):
            raise OSError(f"what listens at {where} is no NATS server")
        info: dict[str, Any] = json.loads(first.removeprefix("INFO "))
        if info.get("tls_required"):
            return Server(where, info)
        who = {"user": url.username, "pass": url.password} if url.password else {"auth_token": url.username}
        hello = {"verbose": False, "pedantic": False, "name": "flowkv-doctor", **who}
        connection.sendall(b"CONNECT " + msgspec.json.encode(hello) + b"\r\nPING\r\n")
        answer = lines.readline().decode(errors="replace").strip()
        return Server(where, info, "" if answer == "PONG" else answer.removeprefix("-ERR "))


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


def payload_mend() -> str:
    return f"put `max_payload: {MAX_PAYLOAD_BYTES}` into the server's configuration, and start it again"
