"""What the gateway measures: vLLM's names, so that its dashboards work, and `flowkv_*` beside them.

One choice counts as one request, as in vLLM. Times are taken where the client feels them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flowkv_common.errors import Cancelled, FlowKVError
from flowkv_gateway.dispatch import Load
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
# Of `RequestState.phases`, those that follow each other; what lies between them is the bus.
_PHASES = ("schedule", "queue", "reserve", "prefill", "decode")


class GatewayMetrics(Collector):
    """All collectors of the gateway, in `registry`, with the model's name as label.

    Every series begins at 0 with the first scrape after the name is known: only what has been 0 shows its
    first increase.
    """

    def __init__(self, registry: CollectorRegistry, loads: Callable[[], Mapping[str, Load]]) -> None:
        """`loads`: by the name of the model, which is there before the first choice of it is made."""
        registry.register(self)  # the first to be asked at a scrape
        self._loads = loads
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
        self._phases = Counter(
            "flowkv_request_phase_seconds",
            "Seconds that answers spent in a phase",
            ["model_name", "phase"],
            registry=registry,
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
        loads = self._loads()
        for name in loads:
            for family in self._families:
                family.labels(name)
            for reason in ("stop", "length", "abort", "error"):
                self._finished.labels(name, reason)
            for phase in _PHASES:
                self._phases.labels(name, phase)
        for metric, text, values in (
            (
                "vllm:num_requests_running",
                "Answers that a node works at",
                {name: load.num_running for name, load in loads.items()},
            ),
            (
                "vllm:num_requests_waiting",
                "Answers that wait, here or at a node",
                {name: load.num_waiting for name, load in loads.items()},
            ),
            (
                "vllm:kv_cache_usage_perc",
                "Share of all nodes' KV blocks in use, 0 to 1",
                {name: load.kv_cache_usage for name, load in loads.items()},
            ),
        ):
            gauge = GaugeMetricFamily(metric, text, labels=["model_name"])
            for name, value in values.items():
                gauge.add_metric([name], value)
            yield gauge

    def count_error(self, status: int) -> None:
        """Count an error that is shown: one whose client has gone is not."""
        if status != CLIENT_HAS_GONE:
            self._errors.labels(str(status)).inc()

    def count_group(self, model_name: str, num_choices: int) -> None:
        """Count a prompt that so many choices were asked for."""
        self.num_choices.labels(model_name).observe(num_choices)

    @contextlib.contextmanager
    def observe(self, choice: Choice) -> Iterator[Callable[[int], None]]:
        """Measures one choice while it is made; gives what to call with each chunk's number of tokens.

        One that is not finished at the end is for `count_unfinished`.
        """
        name, request = choice.request.model_name, choice.request
        itl, answer_tokens = self.itl.labels(name), self.answer_tokens.labels(name)  # once: each token counts
        began = perf_counter()
        first_at = last_at = 0.0

        def on_tokens(num_tokens: int) -> None:
            nonlocal first_at, last_at
            if not num_tokens:
                return
            now = perf_counter()
            if first_at:
                itl.observe(now - last_at)
            else:
                first_at = now
                self.ttft.labels(name).observe(now - began)
                self.prompt_tokens.labels(name).inc(len(request.prompt_ids))
                self.cache_queries.labels(name).inc(len(request.prompt_ids))
                self.cache_hits.labels(name).inc(request.num_cached_tokens)
            last_at = now
            answer_tokens.inc(num_tokens)

        self._open.inc()
        try:
            yield on_tokens
        finally:
            self._open.dec()
            if choice.finish_reason is not None:
                self._finished.labels(name, choice.finish_reason).inc()
                observed: list[tuple[Histogram, float]] = [
                    (self.prompt_length, len(request.prompt_ids)),
                    (self.answer_length, choice.num_tokens),
                    (self.max_tokens, request.sampling.max_tokens),
                    (self.e2e, perf_counter() - began),
                ]
                if first_at:
                    observed += [
                        (self.queue, request.queue_s),
                        (self.prefill, max(0.0, first_at - began - request.queue_s)),
                        (self.decode, last_at - first_at),
                        (self.inference, max(0.0, last_at - began - request.queue_s)),
                    ]
                if choice.num_tokens > 1:
                    observed.append((self.tpot, (last_at - first_at) / (choice.num_tokens - 1)))
                for family, value in observed:
                    family.labels(name).observe(value)
                for phase in _PHASES:
                    self._phases.labels(name, phase).inc(request.phases.seconds.get(phase, 0.0))

    def count_unfinished(self, choices: Iterable[Choice], error: FlowKVError | None) -> None:
        """Count those of `choices` that were cut off when their request ended with `error`.

        A choice alone can't say why: it is cancelled alike when its client leaves, when another choice of its
        request fails and when the server stops.
        """
        reason = "abort" if isinstance(error, Cancelled) else "error"
        for choice in choices:
            if choice.finish_reason is None:
                self._finished.labels(choice.request.model_name, reason).inc()
