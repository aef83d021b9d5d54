"""One line per request: what it was, where it ran, how it ended. Never what stood in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from starlette.requests import Request

from flowkv_common.errors import FlowKVError
from flowkv_gateway.answering import Answer
from flowkv_gateway.errors_http import status_of

log = logging.getLogger(__name__)

_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))
# The text of these errors is ours; that of others may repeat what the client has sent.
_OURS = frozenset((429, 500, 503, 504))


class RequestLog:
    """Says nothing where it is not `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def answered(self, request_id: str, answer: Answer, began: float, error: FlowKVError | None) -> None:
        """One that nodes were asked for, `began` by the monotonic clock; `error` is what it ended with."""
        if not self._enabled:
            return
        choices = [choice for group in answer.groups for choice in group]
        records = [choice.generation.record for choice in choices]
        usage = answer.usage()
        ttfts_s = [record.ttft_s for record in records if record.ttft_s is not None]
        fields = {
            "request_id": request_id,
            "status": 200 if error is None else status_of(error),
            "finish_reason": _each(choice.finish_reason or "" for choice in choices),
            "num_prompt_tokens": usage.prompt_tokens,
            "num_output_tokens": usage.completion_tokens,
            "num_cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "ttft_s": round(min(ttfts_s), 4) if ttfts_s else None,
            "total_s": round(time.monotonic() - began, 4),
            "num_attempts": max(record.num_attempts for record in records),
            "prefill_node": _each(record.prefill_node for record in records),
            "decode_node": _each(record.decode_node for record in records),
        }
        log.info("request ended", extra={"fields": {**fields, **_reason(error)}})

    def refused(self, request: Request, error: FlowKVError) -> None:
        """One that was refused before anybody was asked for an answer."""
        if self._enabled and request.url.path in _PATHS:
            fields = {"path": request.url.path, "status": status_of(error)}
            log.info("request refused", extra={"fields": {**fields, **_reason(error)}})


def _reason(error: FlowKVError | None) -> dict[str, str]:
    if error is None:
        return {}
    told = {"error": type(error).__name__}
    if error.field:
        told["field"] = error.field
    if status_of(error) in _OURS:
        told["reason"] = error.message
    return told


def _each(words: Iterable[str]) -> str:
    """Those that there are, each once."""
    return ",".join(sorted({word for word in words if word}))
