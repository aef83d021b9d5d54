"""Traces: what a request went through on each service that had it, for a collector of OpenTelemetry.

Services tell it to a `Tracing`. The ones here forget it: nothing of OpenTelemetry is imported unless its own
variables name a collector. Then `open_tracing` gives those of `flowkv_common/otel.py`, which send it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Self

from flowkv_common.config import wants_traces
from flowkv_common.wire.messages import NodeTimes

# None: it is not known, and not told.
Attributes = Mapping[str, str | bool | int | float | Sequence[str] | None]
# As OpenTelemetry has it: of a call to another service, of its work there, of what stays in one.
Kind = Literal["client", "server", "internal"]

log = logging.getLogger(__name__)


class Span:
    """A stretch of a request's time on one service, until `end` or the end of its `with`.

    All times are monotonic seconds; None is now. Calls after the end change nothing.
    """

    @property
    def is_recorded(self) -> bool:
        """False: nothing comes of the calls, and what is costly to know need not be told."""
        return False

    def describe(self, attributes: Attributes) -> None:
        """Add to its attributes."""

    def add_event(self, name: str, at: float | None = None, attributes: Attributes | None = None) -> None:
        """Something that took no time."""

    def add_part(self, name: str, began: float, took_s: float, attributes: Attributes | None = None) -> None:
        """A whole span below this one, known only now."""

    def add_phases(self, times: NodeTimes, began: float) -> None:
        """A part for each phase of `times`, whose clock has its 0 at `began`."""
        for phase in times.phases if self.is_recorded else ():
            attributes = {
                "flowkv.num_tokens": phase.num_tokens or None,
                "flowkv.num_bytes": phase.num_bytes or None,
                "flowkv.num_copies": phase.num_copies or None,
                "flowkv.num_calls": phase.num_calls or None,
                "flowkv.connector": times.connector or None,
            }
            self.add_part(phase.name, began + phase.at_s, phase.took_s, attributes)

    def current(self) -> AbstractContextManager[None]:
        """Inside, spans that begin are below this one, here and on the services that are asked.

        Not around a `yield`: a generator shares its context with its caller.
        """
        return contextlib.nullcontext()

    def fail(self, error: Exception | str) -> None:
        """It ends with this error, or with one of this kind."""

    def end(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):  # a cancelled task has not failed
            self.fail(error)
        self.end()


class Tracing:
    """Begins spans, and carries them to other services in the headers of messages (W3C Trace Context)."""

    is_on = False

    def begin(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        began: float | None = None,
    ) -> Span:
        """A span below the one that is current in this task; without one it begins a trace."""
        return NO_SPAN

    def headers(self) -> dict[str, str]:
        """Those of a message to another service, which name the current span."""
        return {}

    def continuing(self, headers: Mapping[str, str] | None) -> AbstractContextManager[None]:
        """Inside, the span that the headers of a message name is the current one; none if they name none."""
        return contextlib.nullcontext()


NO_SPAN = Span()
NO_TRACING = Tracing()


@contextlib.asynccontextmanager
async def open_tracing(service: str, instance_id: str) -> AsyncIterator[Tracing]:
    """That of a process of this service, until the context ends; on exit what is left is sent.

    Without the `otel` extra a warning says so, and the service runs untraced.
    """
    if not wants_traces():
        yield NO_TRACING
        return
    try:
        from flowkv_common.otel import sending_traces
    except ModuleNotFoundError as error:
        log.warning("no traces: %s is not installed: pip install 'flowkv[otel]'", error.name)
        yield NO_TRACING
        return
    async with sending_traces(service, instance_id) as tracing:
        yield tracing
