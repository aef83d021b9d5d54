"""Metrics and health over HTTP, the same for every service. Knows nothing of what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flowkv_common.service_connection import ServiceConnection
from flowkv_common.tasks import group

_MAX_UNSENT_BYTES = 64 * 1024  # per connection, in the kernel
_LAST_WORD_S = 2.0


def process_registry() -> CollectorRegistry:
    """A registry with what is told of every process: `process_*`, of its CPU, memory and descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def metrics_routes(registry: CollectorRegistry) -> list[Route]:
    """`GET` and `HEAD /metrics` in Prometheus' text form."""

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return [Route("/metrics", metrics)]


def health_routes(why_not_ready: Callable[[], str | None], *also_ready: str) -> list[Route]:
    """`/health/live` answers while the loop turns; `/health/ready` says 503 with the reason.

    So do `/health` and further paths.
    """

    async def live(_: Request) -> Response:
        return PlainTextResponse("live\n")

    async def ready(_: Request) -> Response:
        reason = why_not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    paths = ("/health/ready", "/health", *also_ready)
    return [Route("/health/live", live), *(Route(path, ready) for path in paths)]


def service_app(registry: CollectorRegistry, why_not_ready: Callable[[], str | None]) -> Starlette:
    """The HTTP side of a service that has no API of its own."""
    return Starlette(routes=[*metrics_routes(registry), *health_routes(why_not_ready)])


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the service decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn only cancels what is left at the end. These tasks have a word to say to their clients."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORD_S)


@contextlib.asynccontextmanager
async def serve_http(
    app: Starlette,
    host: str,
    port: int,
    *,
    connection: type[asyncio.Protocol] = ServiceConnection,
    max_header_bytes: int = 64 * 1024,
    unread_timeout_s: float = 60.0,
    keep_alive_s: float = 75.0,
    drain_timeout_s: float = 5.0,
) -> AsyncIterator[int]:
    """Serve `app` while the context lasts; gives the bound port (`port` 0 takes any free one).

    A client that takes nothing of what was sent for `unread_timeout_s` is dropped (Linux only), an idle
    connection after `keep_alive_s`. On exit no new connection is taken, and open responses have
    `drain_timeout_s` to end; what runs then is cancelled, and has 2 s to tell its client.
    Raises OSError when the address can't be had.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=connection,
        ws="none",
        h11_max_incomplete_event_size=max_header_bytes,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=drain_timeout_s,  # type: ignore[arg-type]
    )
    server = _QuietServer(config)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    takes_both = host == "::" and socket.has_dualstack_ipv6()
    with socket.create_server(
        (host, port), family=family, backlog=2048, dualstack_ipv6=takes_both
    ) as listener:
        _tune(listener, unread_timeout_s)
        async with group() as tasks:
            tasks.create_task(server.serve(sockets=[listener]))
            try:
                # The kernel queues connections from here on: nobody has to wait for the server.
                yield int(listener.getsockname()[1])
            finally:
                server.should_exit = True


def _tune(listener: socket.socket, unread_timeout_s: float) -> None:
    """Options that accepted connections inherit; some systems lack the last two."""
    # asyncio sets this only for sockets made with an explicit protocol; without it, the second write of each
    # response waits for the client's delayed acknowledgement of the first: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # Else the kernel takes 3 MB for a client that reads nothing, and we learn of it only then.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unread_timeout_s * 1000))
