"""What the gateway measures: vLLM's names, so that its dashboards work, and `flowkv_*` beside them.

One choice counts as one request, as in vLLM. Times are taken where the client feels them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flowkv_common.errors import Cancelled, FlowKVError
from flowkv_gateway.dispatch import Load, RequestState
from flowkv_gateway.errors import CLIENT_HAS_GONE, ERROR_TYPES
from flowkv_gateway.output import Choice

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


class GatewayMetrics(Collector):
    """All collectors of the gateway, in `registry`, with the model's name as label.

    Every series begins at 0 with the first scrape after the name is known: only what has been 0 shows its
    first increase.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: Callable[[], str],
        *,
        is_known: Callable[[], bool],
        load: Callable[[], Load],
    ) -> None:
        """`is_known`: whether the model's name is final."""
        registry.register(self)  # the first to be asked at a scrape
        self._model_name = model_name
        self._is_known = is_known
        self._load = load
        self._families: list[Counter | Histogram] = []  # of one label, the model's name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=registry)
            self._families.append(family)
            return family

        def counter(name: str, text: str) -> Counter:
            family = Counter(name, text, ["model_name"], registry=registry)
            self._families.append(family)
            return family

        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _TTFT_S)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens", _TOKEN_S)
        self.tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean after first", _TOKEN_S)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _REQUEST_S)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waits before first token", _REQUEST_S)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Waits to first token", _REQUEST_S)
        self.decode = histogram("vllm:request_decode_time_seconds", "First to last token", _REQUEST_S)
        self.inference = histogram("vllm:request_inference_time_seconds", "Waits to last token", _REQUEST_S)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt length", _TOKENS)
        self.answer_length = histogram("vllm:request_generation_tokens", "Answer length", _TOKENS)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens", _TOKENS)
        self.num_choices = histogram("vllm:request_params_n", "n", _NUM_CHOICES)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens taken in")
        self.answer_tokens = counter("vllm:generation_tokens", "Tokens generated")
        self.cache_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked for in prefix caches")
        self.cache_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in prefix caches")
        self._finished = Counter(
            "vllm:request_success", "Ended", ["model_name", "finished_reason"], registry=registry
        )
        self._open = Gauge("flowkv_gateway_open_choices", "Answers in the making", registry=registry)
        self.slow_clients = Counter(
            "flowkv_gateway_slow_clients", "Streams cut since nobody read them", registry=registry
        )
        self._errors = Counter("flowkv_gateway_errors", "Errors shown", ["status"], registry=registry)
        for status in ERROR_TYPES:
            if status != CLIENT_HAS_GONE:
                self._errors.labels(str(status))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What is read at a scrape."""
        if not self._is_known():
            return
        name = self._model_name()
        for family in self._families:
            family.labels(name)
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(name, reason)
        load = self._load()
        for metric, text, value in (
            ("vllm:num_requests_running", "Answers that a node works at", load.num_running),
            ("vllm:num_requests_waiting", "Answers that wait, here or at a node", load.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of all nodes' KV blocks in use, 0 to 1", load.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(metric, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge

    def count_error(self, status: int) -> None:
        """Count an error that is shown: one whose client has gone is not."""
        if status != CLIENT_HAS_GONE:
            self._errors.labels(str(status)).inc()

    def count_group(self, num_choices: int) -> None:
        """Count a prompt that so many choices were asked for."""
        self.num_choices.labels(self._model_name()).observe(num_choices)

    @contextlib.contextmanager
    def observe(self, choice: Choice) -> Iterator[ChoiceTimes]:
        """Measures one choice while it is made. One that is not finished then is for `count_unfinished`."""
        name = self._model_name()
        times = ChoiceTimes(self, name, choice.request)
        self._open.inc()
        try:
            yield times
        finally:
            self._open.dec()
            if choice.finish_reason is not None:
                self._finished.labels(name, choice.finish_reason).inc()
                times.on_end(choice.num_tokens)

    def count_unfinished(self, choices: Iterable[Choice], error: FlowKVError | None) -> None:
        """Count those of `choices` that were cut off when their request ended with `error`.

        A choice alone can't say why: it is cancelled alike when its client leaves, when another choice of its
        request fails and when the server stops.
        """
        reason = "abort" if isinstance(error, Cancelled) else "error"
        for choice in choices:
            if choice.finish_reason is None:
                self._finished.labels(self._model_name(), reason).inc()


class ChoiceTimes:
    """The clock of one choice, started when it is made."""

    def __init__(self, metrics: GatewayMetrics, model_name: str, request: RequestState) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._request = request
        self._itl = metrics.itl.labels(model_name)  # looked up once: these two count each token
        self._answer_tokens = metrics.answer_tokens.labels(model_name)
        self._start = perf_counter()
        self._first: float | None = None
        self._last = self._start

    def on_tokens(self, num_tokens: int) -> None:
        """A chunk with so many tokens has come."""
        if not num_tokens:
            return
        now = perf_counter()
        if self._first is None:
            self._first = now
            num_prompt_tokens = len(self._request.prompt_ids)
            self._observe(self._metrics.ttft, now - self._start)
            self._metrics.prompt_tokens.labels(self._model_name).inc(num_prompt_tokens)
            self._metrics.cache_queries.labels(self._model_name).inc(num_prompt_tokens)
            self._metrics.cache_hits.labels(self._model_name).inc(self._request.num_cached_tokens)
        else:
            self._itl.observe(now - self._last)
        self._last = now
        self._answer_tokens.inc(num_tokens)

    def on_end(self, num_tokens: int) -> None:
        """The answer is complete."""
        metrics, request = self._metrics, self._request
        self._observe(metrics.prompt_length, len(request.prompt_ids))
        self._observe(metrics.answer_length, num_tokens)
        self._observe(metrics.max_tokens, request.sampling.max_tokens)
        self._observe(metrics.e2e, perf_counter() - self._start)
        if self._first is None:
            return
        ttft_s, decode_s = self._first - self._start, self._last - self._first
        self._observe(metrics.queue, request.queue_s)
        self._observe(metrics.prefill, max(0.0, ttft_s - request.queue_s))
        self._observe(metrics.decode, decode_s)
        self._observe(metrics.inference, max(0.0, ttft_s + decode_s - request.queue_s))
        if num_tokens > 1:
            self._observe(metrics.tpot, decode_s / (num_tokens - 1))

    def _observe(self, family: Histogram, value: float) -> None:
        family.labels(self._model_name).observe(value)
