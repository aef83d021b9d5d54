"""`python -m flowkv_common.health PORT [PATH [SECONDS]]`: whether a service is well, by its exit code.

What a container's health check runs: it needs no curl. It asks this host, or FLOWKV_HOST. Loads nothing
but the standard library. With FLOWKV_TLS_CERT or FLOWKV_API_KEYS_FILE in the environment the service is the
gateway that they are for. Of a range, as 9100-9199, it asks at the port that this container's own service
listens on.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 3.0
_LISTENS = "0A"  # the state in /proc/net/tcp


class Entry(NamedTuple):
    """What it takes to ask a service: whether by TLS, and a key, if there is one."""

    has_tls: bool = False
    key: str = ""


PLAIN = Entry()


def gateway_entry(environ: Mapping[str, str]) -> Entry:
    """That of the gateway with these variables. Raises OSError if the file of keys can't be read."""
    key = ""
    if path := environ.get("FLOWKV_API_KEYS_FILE"):
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        key = next((words[1] for words in lines if len(words) == 2 and not words[0].startswith("#")), "")
    return Entry(bool(environ.get("FLOWKV_TLS_CERT")), key)


def problem(
    port: int, path: str, entry: Entry = PLAIN, host: str = "127.0.0.1", timeout_s: float = TIMEOUT_S
) -> str | None:
    """Why the service is not well, in its own words where it has some; None if it is."""
    if entry.has_tls:
        # The certificate is for the name that clients use; the way leads through this host or cluster alone.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"x-api-key": entry.key} if entry.key else {})
        response = connection.getresponse()
        if response.status == 200:
            return None
        return f"{response.status}: {response.read(1000).decode(errors='replace').strip()}"
    except (OSError, http.client.HTTPException) as error:  # also one that ends while it answers
        return str(error) or type(error).__name__
    finally:
        connection.close()


def own_port(ports: range) -> int | None:
    """The port of these that a process of this container listens on; other containers may have their own.

    Where containers share the host's network, nothing else tells whose a port is.
    """
    here = os.readlink("/proc/self/ns/mnt")
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.readlink(process / "ns/mnt") == here:
                sockets |= {os.readlink(file) for file in (process / "fd").iterdir()}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == _LISTENS and port in ports and f"socket:[{fields[9]}]" in sockets:
                    return port
    return None


def main(port: str, path: str = "/health/ready", timeout_s: str = str(TIMEOUT_S)) -> int:
    first, _, last = port.partition("-")
    number = own_port(range(int(first), int(last) + 1)) if last else int(first)
    host = os.environ.get("FLOWKV_HOST", "")
    if number is None:
        found: str | None = f"nothing of this container listens on a port of {port}"
    else:
        own = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        found = problem(number, path, gateway_entry(os.environ), own, float(timeout_s))
    print(found or "well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
