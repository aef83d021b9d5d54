"""Hosts that are network namespaces of this one: an address each on one bridge, and a link that can be cut.

They share this host's kernel, cores, clock and disks. What a process of one can't reach of another is its
loopback, its ports but by the network, and its folder of Unix sockets.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks import BenchmarkFailed

COMMAND_TIMEOUT_S = 10.0
# Makes `$1` a folder of this process alone, then becomes the command.
_WITH_OWN_FOLDER = 'mount -t tmpfs none "$1" && shift && exec "$@"'


class Hosts:
    """A context manager. `address` is this host's on the bridge, where the others reach it.

    The bridge has a namespace too: this host's firewall, such as Docker's, would drop what passes through it.
    """

    def __init__(self, num_hosts: int) -> None:
        mark = secrets.token_hex(2)  # of others that run beside us
        self._switch = f"flowkv-{mark}"
        self._names = [f"flowkv-{mark}-{number}" for number in range(num_hosts)]
        self._link = f"flowkv-{mark}"
        self._network = f"198.18.{random.randrange(256)}"  # kept free for benchmarks (RFC 2544)
        self._made = contextlib.ExitStack()

    @property
    def address(self) -> str:
        return f"{self._network}.1"

    def address_of(self, number: int) -> str:
        return f"{self._network}.{10 + number}"

    def __enter__(self) -> Self:
        """Raises BenchmarkFailed where this user may not, or the program `ip` is missing."""
        with contextlib.ExitStack() as made:
            for name in (self._switch, *self._names):
                _ip("netns", "add", name)
                made.callback(_ip, "netns", "del", name)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            _ip("link", "add", self._link, "type", "veth", "peer", "name", "uplink", "netns", self._switch)
            made.callback(_ip, "link", "del", self._link)
            _ip("addr", "add", f"{self.address}/24", "dev", self._link)
            _ip("link", "set", self._link, "up")
            self._plug_in("uplink")
            for number, name in enumerate(self._names):
                port = _port(number)
                _ip(
                    "-n",
                    name,
                    "link",
                    "add",
                    "eth0",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    port,
                    "netns",
                    self._switch,
                )
                _ip("-n", name, "addr", "add", f"{self.address_of(number)}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    _ip("-n", name, "link", "set", device, "up")
                self._plug_in(port)
            self._made = made.pop_all()
        return self

    def _plug_in(self, port: str) -> None:
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._made.close()

    def command(self, number: int, own_folder: Path, command: list[str]) -> list[str]:
        """The command, as it is run on a host. `own_folder` is an empty one there, whatever it has here."""
        inside = ["sh", "-c", _WITH_OWN_FOLDER, "sh", str(own_folder), *command]
        return ["ip", "netns", "exec", self._names[number], *inside]

    def cut(self, number: int) -> None:
        """Nothing passes to or from it any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", _port(number), "down")

    def mend(self, number: int) -> None:
        _ip("-n", self._switch, "link", "set", _port(number), "up")


def _port(number: int) -> str:
    """Of the bridge, where a host is plugged in."""
    return f"host-{number}"


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except OSError as error:
        raise BenchmarkFailed(f"hosts need the program `ip` (package iproute2): {error}") from None
    if done.returncode:
        said = done.stderr.strip()
        raise BenchmarkFailed(f"hosts need root, and network namespaces: `{' '.join(command)}`: {said}")
