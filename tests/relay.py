"""A TCP relay that can stall: connections stand and bring nothing, as when a network drops all packets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self

_CHUNK_BYTES = 65_536


class Relay:
    """Forwards what comes to `port` to another one of this host while the context lasts.

    `find_port` is asked for each connection; None: nothing listens yet.
    """

    def __init__(self, find_port: Callable[[], int | None]) -> None:
        self._find_port = find_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._flows = threading.Event()
        self._flows.set()
        self._is_over = False
        self._sockets: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._flows.set()
        # A close alone would leave the thread in `accept`.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._accepting.join(5.0)

    def stall(self) -> None:
        """Nothing more passes, in both directions; what comes meanwhile is kept."""
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    def _accept(self) -> None:
        while not self._is_over:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(accepted,), daemon=True).start()

    def _connect(self, accepted: socket.socket) -> None:
        self._flows.wait()
        try:
            # Port 1 refuses, too.
            dialled = socket.create_connection(("127.0.0.1", self._find_port() or 1), timeout=2.0)
        except OSError:
            accepted.close()
            return
        dialled.settimeout(None)
        self._sockets |= {accepted, dialled}
        back = threading.Thread(target=self._copy, args=(dialled, accepted), daemon=True)
        back.start()
        self._copy(accepted, dialled)
        back.join()
        self._sockets -= {accepted, dialled}
        accepted.close()
        dialled.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._flows.wait()
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
