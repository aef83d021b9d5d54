"""What the gateway measures: vLLM's names, so that its dashboards work, and `flowkv_*` beside them.

One choice counts as one request, as in vLLM. Times are taken where the client feels them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from flowkv_common.errors import Cancelled
from flowkv_gateway.choice import Choice

# vLLM's buckets: dashboards compute percentiles from them.
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_NUM_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)


Family = TypeVar("Family", Counter, Histogram)


class _OfModel(Generic[Family]):
    """A family of one label, the model's name, which is asked for each time."""

    def __init__(self, family: Family, model_name: Callable[[], str], is_fixed: bool) -> None:
        self._labels: Callable[[str], Family] = family.labels
        self._model_name = model_name
        if is_fixed:
            self._now()

    def _now(self) -> Family:
        return self._labels(self._model_name())

    def observe(self: _OfModel[Histogram], value: float) -> None:
        self._now().observe(value)

    def inc(self: _OfModel[Counter], value: float = 1) -> None:
        self._now().inc(value)


class GatewayMetrics:
    """All collectors of the gateway, in `registry`, with the model's name as label.

    Where the nodes bring the name (it is not `is_fixed`), a series begins with its first observation.
    """

    def __init__(
        self, registry: CollectorRegistry, model_name: Callable[[], str], *, is_fixed: bool = True
    ) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> _OfModel[Histogram]:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=registry)
            return _OfModel(family, model_name, is_fixed)

        def counter(name: str, text: str) -> _OfModel[Counter]:
            family = Counter(name, text, ["model_name"], registry=registry)
            return _OfModel(family, model_name, is_fixed)

        self._model_name = model_name
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _TTFT_S)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens", _TOKEN_S)
        self.tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean after first", _TOKEN_S)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _REQUEST_S)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt length", _TOKENS)
        self.answer_length = histogram("vllm:request_generation_tokens", "Answer length", _TOKENS)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens", _TOKENS)
        self.num_choices = histogram("vllm:request_params_n", "n", _NUM_CHOICES)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens taken in")
        self.answer_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self._finished = Counter(
            "vllm:request_success", "Ended", ["model_name", "finished_reason"], registry=registry
        )
        self._open = Gauge("flowkv_gateway_open_choices", "Answers in the making", registry=registry)
        self.slow_clients = Counter(
            "flowkv_gateway_slow_clients", "Streams cut since nobody read them", registry=registry
        )
        self._errors = Counter("flowkv_gateway_errors", "Errors shown", ["status"], registry=registry)

    def count_error(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    @contextlib.contextmanager
    def observe(self, choice: Choice) -> Iterator[ChoiceTimes]:
        """Measures one choice, however it ends."""
        times = ChoiceTimes(self, len(choice.generation.prompt_ids))
        self._open.inc()
        reason = "error"
        try:
            yield times
            reason = choice.finish_reason or "error"
        except (asyncio.CancelledError, Cancelled):
            reason = "abort"
            raise
        finally:
            self._open.dec()
            self._finished.labels(self._model_name(), reason).inc()
            if reason in ("stop", "length"):
                self._observe_lengths(choice)
                times.end(choice.num_tokens)

    def _observe_lengths(self, choice: Choice) -> None:
        self.prompt_length.observe(len(choice.generation.prompt_ids))
        self.answer_length.observe(choice.num_tokens)
        self.max_tokens.observe(choice.generation.sampling.max_tokens)


class ChoiceTimes:
    """The clock of one choice, started when it is made."""

    def __init__(self, metrics: GatewayMetrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._start = perf_counter()
        self._first: float | None = None
        self._last = self._start

    def tokens(self, num_tokens: int) -> None:
        """A piece with so many tokens has come."""
        if not num_tokens:
            return
        now = perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.ttft.observe(now - self._start)
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        self._metrics.answer_tokens.inc(num_tokens)

    def end(self, num_tokens: int) -> None:
        self._metrics.e2e.observe(perf_counter() - self._start)
        if self._first is not None and num_tokens > 1:
            self._metrics.tpot.observe((self._last - self._first) / (num_tokens - 1))
