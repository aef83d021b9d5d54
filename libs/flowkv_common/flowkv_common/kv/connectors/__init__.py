"""The transports: each moves blocks between two pools and keeps the promises of `kv.connector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowkv_common.kv.connector import KVConnector, Landings
from flowkv_common.kv.connectors.shm import ShmConnector
from flowkv_common.kv.connectors.tcp import TcpConnector
from flowkv_common.kv.pool import KVPool


def make_connectors(
    names: Sequence[str], pool: KVPool, landings: Landings, admits: Callable[[str], bool], *, host: str
) -> list[KVConnector]:
    """The connectors called `names`, in that order; `host` is where peers reach the TCP one.

    Raises ValueError for an unknown name.
    """
    makers: dict[str, Callable[[], KVConnector]] = {
        "shm": lambda: ShmConnector(pool, landings, admits),
        "tcp": lambda: TcpConnector(pool, landings, admits, host=host),
    }
    if unknown := set(names) - set(makers):
        raise ValueError(f"unknown connectors {sorted(unknown)}: {', '.join(makers)} are")
    return [makers[name]() for name in names]
