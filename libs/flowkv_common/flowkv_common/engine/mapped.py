"""Gives back the memory of weights that are mapped from a file, once they are packed elsewhere."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4


def give_back(weights: Iterable[Tensor]) -> None:
    """Drops their pages from this process; whoever reads them again reads the file.

    Only whole pages of private file mappings, as safetensors makes them: they hold what the file holds, for
    nobody writes to weights. Memory that no file backs stays. Does nothing where there is no /proc.
    """
    mapped = _file_mappings()
    for weight in weights:
        start = weight.data_ptr()
        stop = start + weight.numel() * weight.element_size()
        if any(first <= start and stop <= last for first, last in mapped):
            first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            num_bytes = stop // mmap.PAGESIZE * mmap.PAGESIZE - first_page
            if num_bytes > 0:
                _madvise(first_page, num_bytes)


def _file_mappings() -> list[tuple[int, int]]:
    """Address ranges, private and of a file."""
    if not _MAPS.exists():
        return []
    found = []
    for line in _MAPS.read_text().splitlines():
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if permissions.endswith("p") and inode != "0":
            start, stop = addresses.split("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def _madvise(address: int, num_bytes: int) -> None:
    # It is advice: where it is refused, nothing but memory is lost.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_DONTNEED)
