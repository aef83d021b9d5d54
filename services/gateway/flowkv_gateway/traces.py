"""What a trace tells of a request at the gateway, by OpenTelemetry's conventions: `http.*` and `gen_ai.*`.

Lengths, times and nodes only: prompts and answers are in no span.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowkv_common.tracing import Attributes, Span, Tracing
from flowkv_common.wire.messages import AttemptTimes, SamplingParams

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_CONTEXT_HEADERS = ("traceparent", "tracestate", "baggage")


class TraceRequests:
    """ASGI middleware: a span for each request that generates, below the one that its client names."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method != "POST" or path not in GENERATION_PATHS:
            await self._app(scope, receive, send)
            return
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        about: Attributes = {
            "http.request.method": method,
            "http.route": path,
            "url.path": path,
            "url.scheme": scope["scheme"],
            "user_agent.original": named.get("user-agent"),
        }
        with self._tracing.continuing({name: named[name] for name in _CONTEXT_HEADERS if name in named}):
            span = self._tracing.begin(f"{method} {path}", about, kind="server")

        async def send_and_note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                span.describe({"http.response.status_code": status})
                if status >= 500:
                    span.fail(str(status))
            await send(message)

        with span, span.current():
            await self._app(scope, receive, send_and_note_status)


def begin_answer(
    tracing: Tracing,
    *,
    is_chat: bool,
    model: str,
    reply_id: str,
    is_stream: bool,
    num_choices: int,
    sampling: SamplingParams,
) -> Span:
    """The span of all choices of one answer. A time to first chunk is told of streams alone."""
    operation = "chat" if is_chat else "text_completion"
    about: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "flowkv",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": reply_id,
        "gen_ai.request.stream": is_stream,
        "gen_ai.request.choice.count": num_choices if num_choices > 1 else None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
    }
    return tracing.begin(f"{operation} {model}", about)


def describe_answer(
    span: Span,
    *,
    num_prompt: int,
    num_cached: int,
    num_output: int,
    num_reasoning: int | None,
    finish_reasons: Sequence[str],
    ttft_s: float | None,
) -> None:
    """What is known at its end."""
    span.describe(
        {
            "gen_ai.usage.input_tokens": num_prompt,
            "gen_ai.usage.cache_read.input_tokens": num_cached,
            "gen_ai.usage.output_tokens": num_output,
            "gen_ai.usage.reasoning.output_tokens": num_reasoning,
            "gen_ai.response.finish_reasons": finish_reasons,
            "gen_ai.response.time_to_first_chunk": ttft_s,
        }
    )


def add_attempt(span: Span, times: AttemptTimes, request_began: float) -> None:
    """What only the gateway saw of an attempt: its tokens as they came. `request_began`: monotonic."""
    for name, at_s in (("first token", times.first_token_s), ("second token", times.second_token_s)):
        if at_s is not None:
            span.add_event(name, request_began + at_s)
    for gap in times.gaps:
        span.add_part("gap", request_began + gap.at_s, gap.took_s)
    if times.last_token_s is not None:
        name = "lost" if times.why_ended else "end"
        span.add_part(name, request_began + times.last_token_s, times.ended_s - times.last_token_s)
