"""The transports: each moves blocks between two pools and keeps the promises of `kv.connector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowkv_engine.kv.pool import KVPool, Pool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport.base import KVConnector
from flowkv_engine.transport.shm import ShmConnector
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.tcp import TcpConnector

_Makers = dict[str, Callable[[], KVConnector]]


def make_connectors(
    names: Sequence[str],
    pool: Pool,
    reservations: Reservations,
    admits: Callable[[str], bool],
    *,
    place: Place = LOOPBACK,
) -> list[KVConnector]:
    """The connectors called `names`, in that order; `place` is where they listen.

    Raises ValueError for a name that is unknown, or not one for memory where `pool` lies.
    """
    if isinstance(pool, KVPool):
        makers = _for_host_memory(pool, reservations, admits, place)
    else:
        makers = _for_device_memory(pool, reservations, admits, place)
    if unknown := set(names) - set(makers):
        kind = type(pool).__name__
        raise ValueError(f"no connectors for a {kind}: {sorted(unknown)}; {', '.join(makers)} are")
    return [makers[name]() for name in names]


def _for_host_memory(
    pool: KVPool, reservations: Reservations, admits: Callable[[str], bool], place: Place
) -> _Makers:
    return {
        "shm": lambda: ShmConnector(pool, reservations, admits, place=place),
        "tcp": lambda: TcpConnector(pool, reservations, admits, place=place),
    }


def _for_device_memory(
    pool: Pool, reservations: Reservations, admits: Callable[[str], bool], place: Place
) -> _Makers:
    # CuPy is an extra, and there is nothing to import it for on a host without a GPU.
    from flowkv_engine.transport.cuda_ipc import CudaIpcConnector
    from flowkv_engine.transport.cuda_runtime import CudaDevice
    from flowkv_engine.transport.nccl import NcclConnector
    from flowkv_engine.transport.nccl_cupy import CupyNccl

    index = pool.tensor.device.index
    return {
        "cuda_ipc": lambda: CudaIpcConnector(
            pool, reservations, admits, device=CudaDevice(index), place=place
        ),
        "nccl": lambda: NcclConnector(
            pool, reservations, admits, new_backend=lambda: CupyNccl(index), place=place
        ),
    }
