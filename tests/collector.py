"""A collector of OpenTelemetry's traces: takes OTLP over HTTP, as the SDK sends it, and keeps the spans."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowkv_common.telemetry import serve_http

# As the protocol numbers them.
KINDS = {1: "internal", 2: "server", 3: "client"}
ERROR = 2


@dataclass(frozen=True)
class TracedSpan:
    """One span as a collector has it. Times are seconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    began: float
    took_s: float
    is_error: bool
    attributes: dict[str, Any]
    events: list[str]


@dataclass
class Collector:
    url: str = ""
    spans: list[TracedSpan] = field(default_factory=list)
    services: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # and instances

    async def take(self, request: Request) -> Response:
        exported = ExportTraceServiceRequest.FromString(await request.body())
        for resource in exported.resource_spans:
            about = {one.key: _value(one.value) for one in resource.resource.attributes}
            self.services[about["service.name"]].add(about["service.instance.id"])
            for scope in resource.scope_spans:
                self.spans += (_span(about["service.name"], span) for span in scope.spans)
        body = ExportTraceServiceResponse().SerializeToString()
        return Response(body, media_type="application/x-protobuf")


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = Starlette(routes=[Route("/v1/traces", collector.take, methods=["POST"])])
    async with serve_http(app, "127.0.0.1", 0) as port:
        collector.url = f"http://127.0.0.1:{port}"
        yield collector


def _span(service: str, span: Any) -> TracedSpan:
    return TracedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=KINDS[span.kind],
        began=span.start_time_unix_nano / 1e9,
        took_s=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        is_error=span.status.code == ERROR,
        attributes={one.key: _value(one.value) for one in span.attributes},
        events=[event.name for event in span.events],
    )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)
