"""Three real nats-servers that are one cluster; each can be killed, frozen, cut off and restarted."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.nats_server import NatsServer
from tests.relay import Relay

NUM_SERVERS = 3
# A server that was killed leaves an election of 4 to 9 s behind, and may leave two.
_HEALTHY_TIMEOUT_S = 40.0


class NatsCluster:
    """Runs while the context lasts. Its servers are called n0, n1, n2.

    Each server reaches each other one by a relay, so that it can be cut off. As an operator would in earnest,
    the servers ping each other often: else they notice a network that drops packets after half a minute.
    """

    def __init__(self) -> None:
        self.servers: list[NatsServer] = []
        self._relays: dict[tuple[int, int], Relay] = {}  # (from, to)
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        numbers = range(NUM_SERVERS)
        folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-cluster-")))
        try:
            for here, there in itertools.permutations(numbers, 2):
                relay = Relay(partial(self._cluster_port, there))
                self._relays[here, there] = self._opened.enter_context(relay)
            for number in numbers:
                config = folder / f"n{number}.conf"
                config.write_text(json.dumps(self._config(number)))
                self.servers.append(self._opened.enter_context(NatsServer("-c", str(config))))
            self.wait_healthy()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays.values():
            relay.resume()
        self._opened.close()

    def _cluster_port(self, number: int) -> int | None:
        return urlsplit(self.servers[number].cluster_url).port if number < len(self.servers) else None

    def _config(self, number: int) -> dict[str, Any]:
        others = [relay.port for (here, _), relay in self._relays.items() if here == number]
        return {
            "server_name": f"n{number}",
            "ping_interval": "1s",
            "ping_max": 2,
            "cluster": {
                "name": "test",
                "listen": "127.0.0.1:-1",  # any free port
                "routes": [f"nats-route://127.0.0.1:{other}" for other in others],
                "advertise": "127.0.0.1:1",  # what servers tell each other must not lead past the relays
            },
        }

    @property
    def url(self) -> str:
        """Of all servers, with commas between."""
        return ",".join(server.url for server in self.servers)

    def number_of(self, url: str) -> int:
        """Which server listens there."""
        return next(number for number, server in enumerate(self.servers) if server.url == url)

    @contextlib.contextmanager
    def cut_off(self, number: int) -> Iterator[None]:
        """While the context lasts it and the others hear nothing of each other; clients still reach it."""
        relays = [relay for pair, relay in self._relays.items() if number in pair]
        for relay in relays:
            relay.stall()
        try:
            yield
        finally:
            for relay in relays:
                relay.resume()

    def meta_leader(self) -> int | None:
        """The server that leads JetStream, as all that answer agree; None if they don't."""
        answers = [self._ask(number, "/jsz") for number in self._up()]
        return _agreed(answer["meta_cluster"].get("leader") for answer in answers if answer)

    def bucket_leader(self, bucket: str) -> int | None:
        """The server that leads those that keep a bucket, as all that answer agree; None if they don't."""
        answers = [self._bucket(number, bucket) for number in self._up()]
        return _agreed(answer["cluster"].get("leader") for answer in answers if answer)

    def num_keepers(self, bucket: str) -> int:
        """Servers that keep a bucket and are up to date."""
        leader = self.bucket_leader(bucket)
        if leader is None:
            return 0
        replicas = self._bucket(leader, bucket)["cluster"].get("replicas") or []
        return 1 + sum(bool(replica.get("current")) for replica in replicas)

    def wait_kept_by_all(self, bucket: str) -> None:
        """Raises TimeoutError."""
        _wait(lambda: self.num_keepers(bucket) == NUM_SERVERS, _HEALTHY_TIMEOUT_S, f"{bucket} is not on all")

    def wait_healthy(self) -> None:
        """Until all servers are up, and have and know all that JetStream holds. Raises TimeoutError."""
        _wait(self._is_healthy, _HEALTHY_TIMEOUT_S, "the NATS servers are no healthy cluster")

    def _is_healthy(self) -> bool:
        if not all(self._ask(number, "/healthz") for number in range(NUM_SERVERS)):
            return False
        if (leader := self.meta_leader()) is None:
            return False
        meta = (self._ask(leader, "/jsz") or {}).get("meta_cluster", {})
        peers = meta.get("replicas") or []
        return len(peers) == NUM_SERVERS - 1 and all(peer.get("current") for peer in peers)

    def _up(self) -> list[int]:
        return [number for number, server in enumerate(self.servers) if server.is_running]

    def _bucket(self, number: int, bucket: str) -> dict[str, Any]:
        said = self._ask(number, "/jsz?streams=true") or {}
        for account in said.get("account_details") or []:
            for stream in account.get("stream_detail") or []:
                if stream["name"] == f"KV_{bucket}":
                    found: dict[str, Any] = stream
                    return found
        return {}

    def _ask(self, number: int, path: str) -> dict[str, Any] | None:
        """The answer of a server's monitoring; None if it has none, or one that says no."""
        try:
            with urllib.request.urlopen(self.servers[number].monitor_url + path, timeout=1.0) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None


def _agreed(names: Iterable[str | None]) -> int | None:
    """The number of the server that all name."""
    said = set(names)
    return int(name.removeprefix("n")) if len(said) == 1 and (name := said.pop()) else None


def _wait(is_met: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s} s {otherwise}")
        time.sleep(0.05)
