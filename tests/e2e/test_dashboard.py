"""Every query of the dashboard finds a sample in a cluster that has served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from flowkv.local_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docker/observability/dashboard.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
SELECTOR = re.compile(r"\b((?:vllm:|flowkv_|process_)\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(!?=)"([^"]*)"')
PROMPT = "Count to ten. " * 30


@pytest.fixture(scope="module")
def samples(cluster: Cluster) -> list[Sample]:
    """Of all processes, each with the label `job` that Prometheus would give it, after some load."""
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        for _ in range(2):
            body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
    return [
        Sample(sample.name, {**sample.labels, "job": name.split("-")[0]}, sample.value)
        for name, url in cluster.metrics_urls().items()
        for family in text_string_to_metric_families(httpx.get(url).text)
        for sample in family.samples
    ]


def selectors(query: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    for name, matchers in SELECTOR.findall(query):
        yield name, MATCHER.findall(matchers)


def is_selected(sample: Sample, name: str, matchers: list[tuple[str, str, str]]) -> bool:
    return sample.name == name and all(
        (sample.labels.get(label, "") == value) == (how == "=") for label, how, value in matchers
    )


@pytest.mark.parametrize("title", QUERIES)
def test_a_query_finds_samples(samples: list[Sample], title: str) -> None:
    asked = list(selectors(QUERIES[title]))
    assert asked
    for name, matchers in asked:
        assert any(is_selected(sample, name, matchers) for sample in samples), (name, matchers)


def value(samples: list[Sample], name: str, **labels: str) -> float:
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    assert found, (name, labels)
    return sum(found)


def test_what_was_served_is_counted_where_it_belongs(samples: list[Sample]) -> None:
    assert value(samples, "flowkv_handoffs_total", result="done") >= 2
    queries, hits = (value(samples, f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
    assert queries > hits > 0
    num_ended = value(samples, "vllm:e2e_request_latency_seconds_count")
    for phase in ("queue", "prefill", "decode", "inference"):
        assert value(samples, f"vllm:request_{phase}_time_seconds_count") == num_ended
    whole_s = value(samples, "vllm:request_queue_time_seconds_sum") + value(
        samples, "vllm:request_inference_time_seconds_sum"
    )
    assert whole_s == pytest.approx(value(samples, "vllm:e2e_request_latency_seconds_sum"), rel=0.05)
    phases_s = {
        phase: value(samples, "flowkv_request_phase_seconds_total", phase=phase)
        for phase in ("schedule", "queue", "reserve", "prefill", "decode")
    }
    assert min(phases_s.values()) > 0
    # The rest of an answer's time is the bus's.
    assert sum(phases_s.values()) <= value(samples, "vllm:e2e_request_latency_seconds_sum") * 1.01
    assert value(samples, "flowkv_regime", regime="normal") == 1
    assert value(samples, "flowkv_schedule_seconds_bucket", le="0.0001") <= value(
        samples, "flowkv_schedule_seconds_bucket", le="0.0002"
    )


def test_first_errors_show_in_a_rate(samples: list[Sample]) -> None:
    for reason in ("stop", "length", "abort", "error"):
        value(samples, "vllm:request_success_total", finished_reason=reason)
    for status in (400, 429, 500, 503, 504):
        value(samples, "flowkv_gateway_errors_total", status=str(status))
    for result in ("done", "unneeded", "cancelled", "failed"):
        value(samples, "flowkv_handoffs_total", result=result)
    for outcome in ("assigned", "wait", "400", "429", "503"):
        value(samples, "flowkv_schedule_decisions_total", outcome=outcome)
