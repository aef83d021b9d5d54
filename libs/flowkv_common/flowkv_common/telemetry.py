"""What every service tells of itself: metrics and health over HTTP, logs, and why it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import cast

import h11
import msgspec
import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from flowkv_common.aio import group
from flowkv_common.errors import CannotStart, Unavailable

MAX_CONNECTIONS = 64
_IDLE_TIMEOUT_S = 10.0
_MAX_HEADER_BYTES = 64 * 1024
_MAX_UNSENT_BYTES = 64 * 1024  # per connection, in the kernel
# A client that takes nothing of what was sent for this long is dropped (Linux only).
_UNREAD_TIMEOUT_S = 60
# A response that is cancelled on exit has this long to tell its client.
_LAST_WORD_S = 2.0
# An address that others have, or that this host does not have, or that this user may not have.
_ADDRESS_ERRORS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)

log = logging.getLogger(__name__)


def process_registry() -> CollectorRegistry:
    """A registry with what is told of every process: `process_*`, of its CPU, memory and descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def service_routes(
    registry: CollectorRegistry, why_not_ready: Callable[[], str | None], *also_ready: str
) -> list[Route]:
    """`/metrics` in Prometheus' text form, and `/health/live`, which answers while the loop turns.

    `/health/ready`, `/health` and `also_ready` say 503 with the reason.
    """

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def live(_: Request) -> Response:
        return PlainTextResponse("live\n")

    async def ready(_: Request) -> Response:
        reason = why_not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    paths = ("/health/ready", "/health", *also_ready)
    return [
        Route("/metrics", metrics),
        Route("/health/live", live),
        *(Route(path, ready) for path in paths),
    ]


def service_app(registry: CollectorRegistry, why_not_ready: Callable[[], str | None]) -> Starlette:
    """The HTTP side of a service that has no API of its own."""
    return Starlette(routes=service_routes(registry, why_not_ready))


class ServiceConnection(H11Protocol):
    """uvicorn's connection, closed after 10 s without a whole request.

    When there are more than 64, the one that has waited longest for a request is closed. Scrapes and probes
    ask at once, and can connect again.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()
        if len(self.connections) > MAX_CONNECTIONS:
            connections = cast("set[ServiceConnection]", self.connections)  # a server has one kind
            min(connections, key=lambda one: (not one._is_waiting, one._since))._close_if_waiting()

    def on_response_complete(self) -> None:
        self._end.cancel()
        self._wait_for_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        self._since = self.loop.time()
        self._end = self.loop.call_later(_IDLE_TIMEOUT_S, self._close_if_waiting)

    @property
    def _is_waiting(self) -> bool:
        """Whether no whole request has come that is still to be answered."""
        return self.conn.our_state is h11.IDLE

    def _close_if_waiting(self) -> None:
        if self._is_waiting:
            self.transport.abort()


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the service decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn only cancels what is left at the end: these tasks still have to tell their clients."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORD_S)


@contextlib.asynccontextmanager
async def serve_http(
    app: ASGIApp,
    host: str,
    port: int | range,
    *,
    connection: type[asyncio.Protocol] = ServiceConnection,
    keep_alive_s: float = 75.0,
    drain_timeout_s: float = 5.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve `app` while the context lasts; gives the bound port: of a range the first free one, for 0 any.

    An idle connection is closed after `keep_alive_s`. On exit no new connection is taken, and open responses
    have `drain_timeout_s` to end; those left are cancelled, and have 2 s to tell their clients.
    Raises OSError when the address can't be had.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=connection,
        ws="none",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=drain_timeout_s,  # type: ignore[arg-type]
    )
    config.load()
    config.ssl = tls
    server = _QuietServer(config)
    with _listening(host, range(port, port + 1) if isinstance(port, int) else port) as listener:
        # Accepted connections inherit these options; some systems lack the last two. asyncio sets the first
        # only for sockets made with an explicit protocol; without it, the second write of each response waits
        # for the client's delayed acknowledgement of the first: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Else the kernel takes 3 MB for a client that reads nothing, and we learn of it only then.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_TIMEOUT_S * 1000)
        try:
            async with group() as tasks:
                tasks.create_task(server.serve(sockets=[listener]))
                try:
                    # The kernel queues connections from here on: nobody has to wait for the server.
                    yield int(listener.getsockname()[1])
                finally:
                    server.should_exit = True
        finally:
            # uvicorn does not, if it is cancelled. The loop would go on to poll the socket's number, and be
            # deaf to the next one that gets it.
            for listening in getattr(server, "servers", ()):
                listening.close()


def _listening(host: str, ports: range) -> socket.socket:
    """On the first of the ports that is free. Raises OSError when the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    takes_both = host == "::" and socket.has_dualstack_ipv6()
    for port in ports:
        try:
            return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=takes_both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise ValueError("no port is named")


def setup_logs(service: str) -> None:
    """Send all logs of this process to stderr, with the service's name on each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines(service) if sys.stderr.isatty() else JsonLogLines(service))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class JsonLogLines(logging.Formatter):
    """One JSON object per line, for machines."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class LogLines(logging.Formatter):
    """For a terminal."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s {service:<12} %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given by `extra={"fields": {...}}`, to be read by machines."""
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value not in (None, "")}


@contextlib.contextmanager
def reason_in_one_line(service: str) -> Iterator[None]:
    """Around all that `service` does. Raises SystemExit(1); an unforeseen error keeps its traceback."""
    try:
        yield
    except (CannotStart, Unavailable, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _ADDRESS_ERRORS:
            raise
        log.error("%s ended: %s", service, error)
        raise SystemExit(1) from None
