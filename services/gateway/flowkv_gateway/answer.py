"""Makes all choices of a request and sends them: as one JSON body, or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from flowkv_common.aio import running
from flowkv_common.config import GatewaySettings
from flowkv_common.errors import Cancelled, FlowKVError, Internal, Unavailable
from flowkv_common.tracing import NO_SPAN, Span
from flowkv_gateway.access import KEY_NAME
from flowkv_gateway.dispatch import Dispatch
from flowkv_gateway.errors import STOPPED, ClientTooSlow, error_response, status_of
from flowkv_gateway.http import ABORT, REQUEST_ID
from flowkv_gateway.metrics import GatewayMetrics
from flowkv_gateway.output import Choice, Delta, ReplyWriter, Usage
from flowkv_gateway.traces import GENERATION_PATHS, describe_answer

log = logging.getLogger(__name__)

# An error that comes sooner still gets its own status.
HEADERS_AFTER_S = 1.0
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the tokens
]
# Some clients take these for line ends, though the standard has only CR and LF. With their JSON escapes.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_MAX_LOGGED_USER = 256  # characters: others are a mistake
# The text of these errors is ours; that of others may repeat what the client has sent.
_LOGGED_REASONS = frozenset((429, 500, 503, 504))


@dataclass(eq=False)
class AnswerResponse:
    """Makes the answer, and sends it as one JSON body. `groups`: the choices, one group per prompt.

    When the client goes away, everything that works for it is cancelled at once. A client that reads slowly
    slows only its own request: nothing piles up here.
    """

    is_stream: ClassVar[bool] = False

    groups: Sequence[Sequence[Choice]]
    writer: ReplyWriter
    dispatch: Dispatch
    metrics: GatewayMetrics
    settings: GatewaySettings
    user: str  # as the client calls the person that it asks for
    span: Span = NO_SPAN  # ends with the answer

    def __post_init__(self) -> None:
        self._choices = [choice for group in self.groups for choice in group]
        self._deltas: list[list[Delta]] = [[] for _ in self._choices]
        self._began = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        error: FlowKVError | None = Cancelled("The client has gone.")  # unless it ends otherwise
        try:
            async with asyncio.TaskGroup() as tasks:
                with self.span.current():
                    working = tasks.create_task(self._make_and_send())
                watching = tasks.create_task(self._disconnected())
                await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
                working.cancel()
                watching.cancel()
            if not working.cancelled():
                error = working.result()
        except asyncio.CancelledError:  # the server's time to stop is over
            if not working.cancelled():
                error = working.result()
            else:
                error = Unavailable(STOPPED)  # also if the client does not hear of it
                await self._report_error(error)
        finally:
            self.metrics.count_unfinished(self._choices, error)
            if self.settings.log_requests:
                self._log_end(error)
            self._end_span(error)

    # --- how the answer is sent ------------------------------------------------------------------

    async def _send_delta(self, delta: Delta) -> None:
        self._deltas[delta.choice].append(delta)

    async def _send_end(self) -> None:
        body = self.writer.whole(self._sent_choices(), self._usage())
        await Response(body, media_type="application/json")(self._scope, self._receive, self._send)

    def _sent_choices(self) -> Sequence[Sequence[Delta]]:
        return self._deltas

    async def _send_error(self, error: FlowKVError) -> None:
        response = error_response(error, self._scope["path"])
        await response(self._scope, self._receive, self._send)

    # --- how it is made --------------------------------------------------------------------------

    async def _disconnected(self) -> None:
        """Returns when the client has gone. The request's body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _make_and_send(self) -> FlowKVError | None:
        """Returns the error that the client got or was cut off for, None if there was none."""
        try:
            tenant = self._choices[0].request.tenant
            with tenant.open_request(self._usage().num_prompt) if tenant else nullcontext():
                await self._make_choices()
            await self._send_end()
            return None
        except ClientTooSlow as slow:
            return slow
        except FlowKVError as error:
            return await self._report_error(error)
        except Exception:
            log.exception("answering failed")
            return await self._report_error(Internal("Internal error."))

    async def _report_error(self, error: FlowKVError) -> FlowKVError:
        self.metrics.count_error(status_of(error))
        try:
            await self._send_error(error)
        except ClientTooSlow as slow:
            return slow
        return error

    async def _make_choices(self) -> None:
        """Until every choice has ended. If one fails its error is raised, and the others are cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in self.groups:
                    tasks.create_task(self._make_group(group, tasks))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _make_group(self, group: Sequence[Choice], tasks: asyncio.TaskGroup) -> None:
        """The first choice goes ahead, so that the others find its prompt in the prefix cache."""
        self.metrics.count_group(group[0].request.model_name, len(group))
        first, *others = group
        has_tokens = asyncio.Event()
        tasks.create_task(self._make_choice(first, has_tokens))
        if others:
            await has_tokens.wait()
        for choice in others:
            tasks.create_task(self._make_choice(choice, has_tokens))

    async def _make_choice(self, choice: Choice, has_tokens: asyncio.Event) -> None:
        with self.metrics.observe(choice) as on_tokens:
            async with aclosing(self.dispatch.generate(choice.request)) as chunks:
                async for chunk in chunks:
                    has_tokens.set()
                    on_tokens(len(chunk.token_ids))
                    for delta in choice.push(chunk):
                        await self._send_delta(delta)
                    if choice.finish_reason is not None:
                        return
            raise Internal("The answer broke off.")

    def _usage(self) -> Usage:
        firsts = [group[0].request for group in self.groups]
        tells_reasoning = self._choices[0].num_reasoning_tokens is not None
        num_reasoning = sum(choice.num_reasoning_tokens or 0 for choice in self._choices)
        return Usage(
            num_prompt=sum(len(first.prompt_ids) for first in firsts),
            num_cached=sum(first.num_cached_tokens for first in firsts),
            num_output=sum(choice.num_tokens for choice in self._choices),
            num_reasoning=num_reasoning if tells_reasoning else None,
        )

    def _log_end(self, error: FlowKVError | None) -> None:
        requests = [choice.request for choice in self._choices]
        usage, ttft_s = self._usage(), self._ttft_s()
        fields = {
            "request_id": self.writer.reply_id,
            **_client_fields(self._scope),
            "user": self.user[:_MAX_LOGGED_USER],
            "status": 200 if error is None else status_of(error),
            "finish_reason": _each(choice.finish_reason or "" for choice in self._choices),
            "num_prompt_tokens": usage.num_prompt,
            "num_output_tokens": usage.num_output,
            "num_cached_tokens": usage.num_cached,
            "ttft_s": None if ttft_s is None else round(ttft_s, 4),
            "total_s": round(time.monotonic() - self._began, 4),
            "num_attempts": max(request.num_attempts for request in requests),
            "prefill_node": _each(request.prefill_node for request in requests),
            "decode_node": _each(request.decode_node for request in requests),
        }
        log.info("request ended", extra={"fields": {**fields, **_error_fields(error)}})

    def _ttft_s(self) -> float | None:
        """Of the choice that began first; None if none has."""
        return min((s for one in self._choices if (s := one.request.ttft_s) is not None), default=None)

    def _end_span(self, error: FlowKVError | None) -> None:
        if self.span.is_recorded:
            usage = self._usage()
            describe_answer(
                self.span,
                num_prompt=usage.num_prompt,
                num_cached=usage.num_cached,
                num_output=usage.num_output,
                num_reasoning=usage.num_reasoning,
                finish_reasons=[choice.finish_reason or "error" for choice in self._choices],
                ttft_s=self._ttft_s() if self.is_stream else None,
            )
        if error is not None and not isinstance(error, Cancelled):  # a client that leaves is no failure
            self.span.fail(error)
        self.span.end()


@dataclass(eq=False, kw_only=True)
class BestResponse(AnswerResponse):
    """Sends of each group the `num_best` choices with the highest mean log probability, the best first."""

    num_best: int
    shows_logprobs: bool

    def _sent_choices(self) -> Sequence[Sequence[Delta]]:
        groups = [[self._deltas[choice.index] for choice in group] for group in self.groups]
        best = [sorted(group, key=_mean_logprob, reverse=True)[: self.num_best] for group in groups]
        return [
            [
                delta._replace(choice=index, logprob=delta.logprob if self.shows_logprobs else None)
                for delta in deltas
            ]
            for index, deltas in enumerate(chain.from_iterable(best))
        ]


def _mean_logprob(deltas: Iterable[Delta]) -> float:
    logprobs = [delta.logprob.logprob for delta in deltas if delta.logprob is not None]
    return fmean(logprobs) if logprobs else -math.inf


@dataclass(eq=False)
class StreamResponse(AnswerResponse):
    """Sends the events of each token. An error before the headers is a plain error response, later an event.

    Headers go out with the first token, or after a second. A silence of `ping_s` is filled by a ping.
    Every write waits for the client to read, but no longer than `send_timeout_s`: the server's own bounded
    write buffer is all that a client can fill.
    """

    is_stream: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._is_started = False
        self._sending = asyncio.Lock()
        self._sent_at = time.monotonic()

    async def _make_choices(self) -> None:
        async with running(self._keep_open()):
            await super()._make_choices()

    async def _send_delta(self, delta: Delta) -> None:
        if not self._is_started:  # the opening is written before
            async with self._sending:
                await self._send_headers()
        await self._send_events(self.writer.delta(delta, self._usage))

    async def _send_end(self) -> None:
        await self._send_last_events(self.writer.closing(self._usage))

    async def _send_error(self, error: FlowKVError) -> None:
        if self._is_started:
            await self._send_last_events(self.writer.failure(error))
        else:
            await super()._send_error(error)

    async def _keep_open(self) -> None:
        """Until cancelled: headers after a second, then a ping after each `ping_s` of silence (0: none).

        Else a proxy would cut off a client that waits long for its first token. Raises ClientTooSlow.
        """
        await asyncio.sleep(HEADERS_AFTER_S)
        async with self._sending:
            await self._send_headers()
        while ping_s := self.settings.ping_s:
            await asyncio.sleep(self._sent_at + ping_s - time.monotonic())
            async with self._sending:
                if time.monotonic() - self._sent_at >= ping_s:
                    await self._send_body(self.writer.ping)

    async def _send_events(self, events: bytes) -> None:
        """Once the headers are out. Raises ClientTooSlow."""
        if events:
            async with self._sending:
                await self._send_body(events)

    async def _send_last_events(self, events: bytes) -> None:
        await self._send_events(events)
        await self._send_body(b"", more_body=False)

    async def _send_headers(self) -> None:
        """With them goes what opens the stream."""
        if not self._is_started:
            await self._send_message(
                {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
            )
            self._is_started = True
            if opening := self.writer.opening(self._usage):
                await self._send_body(opening)

    async def _send_body(self, body: bytes, *, more_body: bool = True) -> None:
        if 0xE2 in body or 0xC2 in body:  # their first bytes
            for line_break, escaped in _LINE_BREAKS:
                body = body.replace(line_break, escaped)
        await self._send_message({"type": "http.response.body", "body": body, "more_body": more_body})
        self._sent_at = time.monotonic()

    async def _send_message(self, message: Message) -> None:
        timeout_s = self.settings.send_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message)
        except TimeoutError:
            slow = ClientTooSlow(f"Nothing was read for {timeout_s:g} s.")
            self.metrics.slow_clients.inc()
            log.warning("cut off a client: %s", slow)
            abort: Callable[[], None] | None = self._scope.get("extensions", {}).get(ABORT)
            if abort is not None:  # closing would wait for the client to read what is left
                abort()
            raise slow from None


def log_refusal(request: Request, error: FlowKVError) -> None:
    """A line for a generation request that was refused before any node was asked."""
    if request.url.path in GENERATION_PATHS:
        fields = {"path": request.url.path, "status": status_of(error), **_client_fields(request.scope)}
        log.info("request refused", extra={"fields": {**fields, **_error_fields(error)}})


def _client_fields(scope: Scope) -> dict[str, str]:
    """The name of the request's key and its `x-request-id`."""
    request_id = scope.get("extensions", {}).get(REQUEST_ID, "")
    return {"key": scope.get(KEY_NAME, ""), "x_request_id": request_id}


def _error_fields(error: FlowKVError | None) -> dict[str, str]:
    if error is None:
        return {}
    reason = {"error": type(error).__name__}
    if error.field:
        reason["field"] = error.field
    if status_of(error) in _LOGGED_REASONS:
        reason["reason"] = error.message
    return reason


def _each(words: Iterable[str]) -> str:
    """The different words, without empty ones."""
    return ",".join(sorted({word for word in words if word}))
