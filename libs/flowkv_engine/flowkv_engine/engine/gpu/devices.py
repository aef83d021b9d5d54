"""Which device a node computes on. Nodes of one host never take the same GPU by accident."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flowkv_common.errors import CannotStart

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(name: str, folder: Path) -> Iterator[torch.device]:
    """The device called `name`. "cuda" is the first GPU that no other node has claimed in `folder`.

    "cpu" and "cuda:1" are taken as they are: several nodes may be given the same GPU by name. Raises
    `CannotStart` if there is no such device, or none is left.
    """
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise CannotStart(f"FLOWKV_DEVICE is {name!r}: choose one of cpu, cuda, cuda:1")
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise CannotStart(f"there is no GPU for {name}: torch sees {num_gpus}")
    if device.type == "cpu" or device.index is not None:
        yield device
        return
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(num_gpus)]
    with claimed_index(uuids, folder) as index:
        log.info("computing on GPU %d (%s)", index, torch.cuda.get_device_name(index))
        yield torch.device("cuda", index)


@contextlib.contextmanager
def claimed_index(uuids: Sequence[str], folder: Path) -> Iterator[int]:
    """The index of the first GPU that no process holds. Held until the block or the process ends.

    Raises `CannotStart` if others hold all of them.
    """
    for index, uuid in enumerate(uuids):
        try:
            file = (folder / f"flowkv-gpu-{uuid}.lock").open("a")
        except PermissionError:  # another user's
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield index  # closing the file frees the lock
            return
    raise CannotStart(f"other nodes have all {len(uuids)} GPUs: FLOWKV_DEVICE=cuda:0 shares the first")
