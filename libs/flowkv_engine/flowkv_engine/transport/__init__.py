"""The transports: each moves blocks between two pools and keeps the promises of `transport.base`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from flowkv_common.errors import CannotStart
from flowkv_engine.kv.pool import KVPool, Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport.base import KVConnector
from flowkv_engine.transport.mapped import CudaIpcConnector, ShmConnector
from flowkv_engine.transport.nccl import NcclConnector
from flowkv_engine.transport.nixl import NixlConnector
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.tcp import StagedTcpConnector, TcpConnector

log = logging.getLogger(__name__)

# Their libraries open connections of their own, which they do not encrypt.
_UNENCRYPTED = ("nccl", "nixl")


def make_connectors(
    names: Sequence[str],
    pool: Pool,
    reservations: Reservations,
    admits: Callable[[str], bool],
    *,
    place: Place = LOOPBACK,
) -> list[KVConnector]:
    """The connectors called `names`, in that order; `place` is where they listen.

    `admits` says whether a peer that presents this link token may send. Raises `CannotStart` for a name
    that is unknown, not one for memory where `pool` lies, or whose library is not installed.
    """
    makers: dict[str, Callable[..., KVConnector]]
    if isinstance(pool, KVPool):
        memory, makers = "host", {"shm": ShmConnector, "tcp": TcpConnector, "nixl": NixlConnector}
    else:
        # CuPy is an extra, and there is nothing to import it for on a host without a GPU.
        from flowkv_engine.transport.cuda import CudaDevice, CupyNccl

        memory, index = "GPU", pool.tensor.device.index
        makers = {
            "cuda_ipc": partial(CudaIpcConnector, device=CudaDevice(index)),
            "nccl": partial(NcclConnector, new_backend=partial(CupyNccl, index)),
            "nixl": partial(NixlConnector, device=CudaDevice(index)),
            "tcp": partial(StagedTcpConnector, device=CudaDevice(index)),
        }
    for name in names:
        if name not in makers:
            raise CannotStart(
                f"unknown connector {name!r}: choose of {', '.join(makers)} for a KV cache in {memory} memory"
            )
        if place.tls is not None and name in _UNENCRYPTED:
            log.warning("%s moves KV unencrypted: FLOWKV_DATA_TLS_CERT protects its secrets alone", name)
    return [makers[name](pool, reservations, admits, place=place) for name in names]
