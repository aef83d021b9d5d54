"""Files that are read again when they have changed, so that no change of them needs a restart."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Watched(Generic[T]):
    """What `read` makes of some files. `content` looks at them, and reads them again if one has changed.

    If they can't be read then, it is in the log, once, and what was read before still holds.
    """

    def __init__(self, read: Callable[[], T], *paths: str) -> None:
        """Raises OSError or ValueError, as `read` does for files that can't be used."""
        self._read = read
        self._paths = paths
        self._versions = self._current_versions()
        self._content = read()

    def content(self) -> T:
        versions = self._current_versions()
        if versions != self._versions:
            self._versions = versions
            names = ", ".join(self._paths)
            try:
                self._content = self._read()
                log.info("%s: read again", names)
            except (OSError, ValueError) as error:
                log.error("%s: %s; what was read before still holds", names, error)
        return self._content

    def _current_versions(self) -> list[object]:
        return [_version(path) for path in self._paths]


def _version(path: str) -> object:
    try:
        status = os.stat(path)
    except OSError as error:
        return str(error)
    return status.st_mtime_ns, status.st_size, status.st_ino
