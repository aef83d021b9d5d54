"""Traces by OpenTelemetry's SDK, sent as OTLP over HTTP. Only `open_tracing` imports this.

The SDK reads its own variables: where to send, which share of the traces, how many spans at once. It sends
from a thread and holds up no request: spans are dropped when more than `OTEL_BSP_MAX_QUEUE_SIZE` wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from flowkv_common import __version__
from flowkv_common.aio import wait_event
from flowkv_common.tracing import Attributes, Kind, Span, Tracing

# What is left at the end is sent within this. The SDK alone tries for up to half a minute.
LAST_SPANS_S = 2.0
KINDS = {"client": SpanKind.CLIENT, "server": SpanKind.SERVER, "internal": SpanKind.INTERNAL}

log = logging.getLogger(__name__)


class SentSpan(Span):
    """One that a collector gets, if the sampler wants it."""

    def __init__(self, tracer: Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._below = trace.set_span_in_context(span)

    @property
    def is_recorded(self) -> bool:
        return self._span.is_recording()

    def describe(self, attributes: Attributes) -> None:
        if self.is_recorded:
            self._span.set_attributes(_known(attributes))

    def add_event(self, name: str, at: float | None = None, attributes: Attributes | None = None) -> None:
        if self.is_recorded:
            self._span.add_event(name, _known(attributes), _since_1970_ns(at))

    def add_part(self, name: str, began: float, took_s: float, attributes: Attributes | None = None) -> None:
        if self.is_recorded:
            start_ns = _since_1970_ns(began)
            part = self._tracer.start_span(
                name, self._below, attributes=_known(attributes), start_time=start_ns
            )
            part.end(start_ns + round(took_s * 1e9))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        token = context.attach(self._below)
        try:
            yield
        finally:
            context.detach(token)

    def fail(self, error: Exception | str) -> None:
        if self.is_recorded:
            kind = error if isinstance(error, str) else type(error).__name__
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))

    def end(self) -> None:
        if self.is_recorded:
            self._span.end()


class SentTracing(Tracing):
    is_on = True

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        began: float | None = None,
    ) -> Span:
        span = self._tracer.start_span(
            name, kind=KINDS[kind], attributes=_known(attributes), start_time=_since_1970_ns(began)
        )
        return SentSpan(self._tracer, span)

    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        propagate.inject(headers)
        return headers

    @contextlib.contextmanager
    def continuing(self, headers: Mapping[str, str] | None) -> Iterator[None]:
        # From an empty context: that of the task may name another request.
        token = context.attach(propagate.extract(headers or {}, Context()))
        try:
            yield
        finally:
            context.detach(token)


@contextlib.asynccontextmanager
async def sending_traces(service: str, instance_id: str) -> AsyncIterator[Tracing]:
    """The tracing of one process. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these names."""
    own = {"service.name": service, "service.instance.id": instance_id, "service.version": __version__}
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield SentTracing(provider.get_tracer("flowkv", __version__))
    finally:
        await _send_last(provider)


async def _send_last(provider: TracerProvider) -> None:
    """On a thread that may outlast us: a collector that is away must not hold up the exit."""
    loop, is_sent = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(is_sent.set)

    threading.Thread(target=shut_down, name="last-spans", daemon=True).start()
    if not await wait_event(is_sent, LAST_SPANS_S):
        log.warning("the last spans are not sent: the collector did not take them in %g s", LAST_SPANS_S)


def _known(attributes: Attributes | None) -> dict[str, AttributeValue]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}


def _since_1970_ns(at: float | None) -> int:
    """Of a monotonic instant, by the wall clock as it is now."""
    now_ns = time.time_ns()
    return now_ns if at is None else now_ns - round((time.monotonic() - at) * 1e9)
