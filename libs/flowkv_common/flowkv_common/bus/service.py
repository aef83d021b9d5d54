"""Endpoints that answer requests, visible to `nats micro ls|info|stats` (ADR-32).

Requests of one endpoint run at the same time, up to its limit. Knows nothing of what the endpoints do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Self

import msgspec
from nats.aio.msg import Msg
from nats.micro.service import (
    EndpointInfo,
    EndpointStats,
    ServiceInfo,
    ServicePing,
    ServiceStats,
    ServiceVerb,
    control_subject,
)

from flowkv_common import errors
from flowkv_common.bus.connection import Bus, Subscription, error_headers
from flowkv_common.wire.messages import Message, decode

log = logging.getLogger(__name__)

_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


class Endpoint(NamedTuple):
    """`handler` gets every `kind` that arrives on `subject`; what it returns, or raises, is the answer.

    More than `limit` at a time are refused with 429.
    """

    subject: str
    kind: Any  # a Message class, or a union of some
    handler: Callable[[Any], Awaitable[Message]]
    limit: int = 1024

    @property
    def name(self) -> str:
        """The verb: `flowkv.v1.decode.reserve.<node>` is called `reserve`."""
        return self.subject.split(".")[3]


class _Served:
    """An endpoint at work, and its figures."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.num_running = 0
        self.num_requests = 0
        self.num_errors = 0
        self.processing_ns = 0
        self.last_error = ""

    def info(self) -> EndpointInfo:
        return EndpointInfo(name=self.endpoint.name, subject=self.endpoint.subject, queue_group="")

    def stats(self) -> EndpointStats:
        return EndpointStats(
            name=self.endpoint.name,
            subject=self.endpoint.subject,
            queue_group="",
            num_requests=self.num_requests,
            num_errors=self.num_errors,
            processing_time=self.processing_ns,
            average_processing_time=self.processing_ns // max(1, self.num_requests),
            last_error=self.last_error,
        )


class Service:
    """Serves `endpoints` while the context lasts.

    On exit it takes nothing new, waits `drain_timeout_s` for what is running, and answers the rest with 503.
    `version` is semver, `service_id` unique among the services of this `name`; `metadata` that changes comes
    as a function. Raises `ValueError` for any other version, `Unavailable` when it can't subscribe.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        name: str,
        version: str,
        service_id: str,
        endpoints: Sequence[Endpoint],
        metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        drain_timeout_s: float = 5.0,
    ) -> None:
        if not _SEMVER.fullmatch(version):
            raise ValueError(f"version {version!r} is not semver")
        self.name = name
        self.version = version
        self.service_id = service_id
        self._metadata = metadata or {}
        self._bus = bus
        self._served = [_Served(endpoint) for endpoint in endpoints]
        self._drain_timeout_s = drain_timeout_s
        self._started = datetime.now(UTC)
        self._handlers = asyncio.TaskGroup()
        self._intake: list[Subscription] = []
        self._control: list[Subscription] = []

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._metadata() if callable(self._metadata) else self._metadata)

    async def __aenter__(self) -> Self:
        await self._handlers.__aenter__()
        try:
            for served in self._served:
                self._intake.append(await self._listen(served))
            for verb, describe in self._descriptions().items():
                for subject in self._control_subjects(verb):
                    on_control = partial(self._on_control, describe)
                    self._control.append(await self._bus.subscribe_raw(subject, on_control))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        async with asyncio.TaskGroup() as drains:
            for subscription in self._intake:
                drains.create_task(subscription.drain(self._drain_timeout_s))
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                # Not the caller's exception: the group would cancel the handlers and wrap it.
                await self._handlers.__aexit__(None, None, None)
        except TimeoutError:
            log.warning("%s stopped with requests unfinished after %s s", self.name, self._drain_timeout_s)
        for subscription in self._control:
            await subscription.drain()

    @asynccontextmanager
    async def also_serving(self, endpoint: Endpoint) -> AsyncIterator[None]:
        """Serve one more endpoint while this context lasts, inside the service's own.

        On exit what has arrived is still taken, and answered like all that the service has in hand.
        """
        served = _Served(endpoint)
        async with await self._listen(served):
            self._served.append(served)
            try:
                yield
            finally:
                self._served.remove(served)

    async def _listen(self, served: _Served) -> Subscription:
        return await self._bus.subscribe_raw(served.endpoint.subject, partial(self._on_request, served))

    async def _on_request(self, served: _Served, msg: Msg) -> None:
        served.num_requests += 1
        if served.num_running >= served.endpoint.limit:
            full = errors.Full(f"{served.endpoint.subject} has {served.num_running} requests in hand")
            await self._refuse(served, msg, full)
            return
        served.num_running += 1
        self._handlers.create_task(self._answer(served, msg))

    async def _answer(self, served: _Served, msg: Msg) -> None:
        started = time.perf_counter_ns()
        try:
            request = _decode(msg.data, served.endpoint.kind)
            reply = await served.endpoint.handler(request)
            if msg.reply:
                await self._bus.publish(msg.reply, reply)
        except errors.FlowKVError as error:
            await self._refuse(served, msg, error)
        except asyncio.CancelledError:
            await self._refuse(served, msg, errors.Unavailable(f"{self.service_id} is stopping"))
            raise
        except Exception:
            log.exception("request on %s failed", msg.subject)
            await self._refuse(served, msg, errors.Internal(f"internal error in {self.service_id}"))
        finally:
            served.num_running -= 1
            served.processing_ns += time.perf_counter_ns() - started

    async def _refuse(self, served: _Served, msg: Msg, error: errors.FlowKVError) -> None:
        served.num_errors += 1
        served.last_error = f"{error.code}: {error.message}"
        if not msg.reply:
            return
        try:
            await self._bus.publish(msg.reply, error.to_wire(), headers=error_headers(error))
        except errors.FlowKVError as unsent:
            log.warning("can't answer on %s: %s", msg.subject, unsent)

    def _control_subjects(self, verb: ServiceVerb) -> list[str]:
        return [
            control_subject(verb),
            control_subject(verb, self.name),
            control_subject(verb, self.name, self.service_id),
        ]

    def _descriptions(self) -> dict[ServiceVerb, Callable[[], dict[str, Any]]]:
        return {
            ServiceVerb.PING: lambda: self.ping().to_dict(),
            ServiceVerb.INFO: lambda: self.info().to_dict(),
            ServiceVerb.STATS: lambda: self.stats().to_dict(),
        }

    async def _on_control(self, describe: Callable[[], dict[str, Any]], msg: Msg) -> None:
        if msg.reply:
            await self._bus.nc.publish(msg.reply, json.dumps(describe()).encode())

    def ping(self) -> ServicePing:
        return ServicePing(id=self.service_id, name=self.name, version=self.version, metadata=self.metadata)

    def info(self) -> ServiceInfo:
        return ServiceInfo(
            id=self.service_id,
            name=self.name,
            version=self.version,
            metadata=self.metadata,
            description=f"FlowKV {self.name}",  # null, nats-py's default, is not in the ADR
            endpoints=[served.info() for served in self._served],
        )

    def stats(self) -> ServiceStats:
        return ServiceStats(
            id=self.service_id,
            name=self.name,
            version=self.version,
            metadata=self.metadata,
            started=self._started,
            endpoints=[served.stats() for served in self._served],
        )


def _decode(payload: bytes, kind: Any) -> Message:
    """The request in `payload`; raises `BadRequest` that names the field."""
    try:
        return decode(payload, kind)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.invalid_input(str(error)) from None
