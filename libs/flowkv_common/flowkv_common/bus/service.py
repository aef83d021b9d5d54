"""Endpoints that answer requests, visible to `nats micro ls|info|stats` (ADR-32).

nats-py's own service answers one request after the other, knows one kind of error and drops what is running
when it stops. Of it stay the figures, and how they are written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Self

import msgspec
from nats.aio.msg import Msg
from nats.micro.service import (
    SEMVER_REGEX,
    EndpointInfo,
    EndpointStats,
    ServiceInfo,
    ServicePing,
    ServiceStats,
)

from flowkv_common import errors
from flowkv_common.bus.connection import Bus, Subscription
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Message, decode

MAX_RUNNING = 1024  # requests of one endpoint

log = logging.getLogger(__name__)


class Endpoint(NamedTuple):
    """`handler` gets every `kind` that arrives on `subject`; what it returns, or raises, is the answer.

    Requests run at the same time. More than `MAX_RUNNING` are refused with 429.
    """

    subject: str
    kind: Any  # a Message class, or a union of some
    handler: Callable[[Any], Awaitable[Message]]


class _Served:
    """An endpoint at work, and its figures. Its name is the verb: `run` of flowkv.v1.decode.run.<node>."""

    def __init__(self, endpoint: Endpoint, bus: Bus) -> None:
        self.endpoint = endpoint
        self.num_running = 0
        self.stats = EndpointStats(
            name=endpoint.subject.split(".")[3],
            subject=bus.full_name(endpoint.subject),
            queue_group="",
            num_requests=0,
            num_errors=0,
            processing_time=0,
            average_processing_time=0,
        )


class Service:
    """Serves `endpoints` while the context lasts.

    On exit it takes nothing new, waits `drain_timeout_s` for what is running, and answers the rest with 503.
    `version` is semver, `service_id` unique among the services of this `name`; `metadata` is asked each time.
    Raises `ValueError` for any other version, `Unavailable` when it can't subscribe.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        name: str,
        version: str,
        service_id: str,
        endpoints: Sequence[Endpoint],
        metadata: Callable[[], Mapping[str, str]] = dict,
        drain_timeout_s: float = 5.0,
    ) -> None:
        if not SEMVER_REGEX.fullmatch(version):
            raise ValueError(f"version {version!r} is not semver")
        self._service_id = service_id
        self._bus = bus
        self._name = subjects.service_in_namespace(name, bus.namespace)
        self._version = version
        self._metadata = metadata
        self._served = [_Served(endpoint, bus) for endpoint in endpoints]
        self._drain_timeout_s = drain_timeout_s
        self._started = datetime.now(UTC)
        self._handlers = asyncio.TaskGroup()
        self._intake: list[Subscription] = []
        self._control: list[Subscription] = []

    async def __aenter__(self) -> Self:
        await self._handlers.__aenter__()
        try:
            for served in self._served:
                self._intake.append(await self._listen(served))
            for scope in ("", f".{self._name}", f".{self._name}.{self._service_id}"):
                self._control.append(await self._bus.subscribe_raw(f"$SRV.*{scope}", self._describe))
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
            log.warning("%s stopped with requests unfinished after %s s", self._name, self._drain_timeout_s)
        for subscription in self._control:
            await subscription.drain()

    @asynccontextmanager
    async def also_serving(self, endpoint: Endpoint) -> AsyncIterator[None]:
        """Serve one more endpoint while this context lasts, inside the service's own.

        On exit what has arrived is still taken, and answered like all that the service has in hand.
        """
        served = _Served(endpoint, self._bus)
        async with await self._listen(served):
            self._served.append(served)
            try:
                yield
            finally:
                self._served.remove(served)

    async def _listen(self, served: _Served) -> Subscription:
        return await self._bus.subscribe_raw(served.endpoint.subject, partial(self._on_request, served))

    async def _on_request(self, served: _Served, msg: Msg) -> None:
        served.stats.num_requests += 1
        if served.num_running >= MAX_RUNNING:
            full = errors.Full(f"{served.endpoint.subject} has {served.num_running} requests in hand")
            await self._refuse(served, msg, full)
            return
        served.num_running += 1
        self._handlers.create_task(self._answer(served, msg))

    async def _answer(self, served: _Served, msg: Msg) -> None:
        began = time.perf_counter_ns()
        try:
            try:
                request = decode(msg.data, served.endpoint.kind)
            except msgspec.DecodeError as error:
                raise errors.invalid_input(str(error)) from None
            with self._bus.tracing.continuing(msg.headers):
                reply = await served.endpoint.handler(request)
            if msg.reply:
                await self._bus.publish(msg.reply, reply)
        except errors.FlowKVError as error:
            await self._refuse(served, msg, error)
        except asyncio.CancelledError:
            await self._refuse(served, msg, errors.Unavailable(f"{self._service_id} is stopping"))
            raise
        except Exception:
            log.exception("request on %s failed", msg.subject)
            await self._refuse(served, msg, errors.Internal(f"internal error in {self._service_id}"))
        finally:
            served.num_running -= 1
            stats = served.stats
            stats.processing_time += time.perf_counter_ns() - began
            stats.average_processing_time = stats.processing_time // stats.num_requests

    async def _refuse(self, served: _Served, msg: Msg, error: errors.FlowKVError) -> None:
        served.stats.num_errors += 1
        served.stats.last_error = f"{error.code}: {error.message}"
        if not msg.reply:
            return
        headers = {subjects.ERROR_HEADER: error.message, subjects.ERROR_CODE_HEADER: str(error.code)}
        try:
            await self._bus.publish(msg.reply, error.to_wire(), headers=headers)
        except errors.FlowKVError as unsent:
            log.warning("can't answer on %s: %s", msg.subject, unsent)

    async def _describe(self, msg: Msg) -> None:
        """Answer what `nats micro` asks: the verb is the second part of the subject."""
        identity: dict[str, Any] = {
            "id": self._service_id,
            "name": self._name,
            "version": self._version,
            "metadata": dict(self._metadata()),
        }
        stats = [served.stats for served in self._served]
        answer: ServicePing | ServiceInfo | ServiceStats
        match msg.subject.split(".")[1]:
            case "PING":
                answer = ServicePing(**identity)
            case "INFO":
                endpoints = [EndpointInfo(each.name, each.subject, each.queue_group) for each in stats]
                # A description of null, nats-py's default, is not in the ADR.
                answer = ServiceInfo(**identity, description=f"FlowKV {self._name}", endpoints=endpoints)
            case "STATS":
                answer = ServiceStats(**identity, started=self._started, endpoints=stats)
            case _:
                return
        if msg.reply:
            await self._bus.nc.publish(msg.reply, json.dumps(answer.to_dict()).encode())
