"""Prometheus finds every container of every service, and the dashboard asks for what they have."""

from __future__ import annotations

import asyncio
import collections
import json
import re

import httpx
import pytest

from tests.compose.composed import ROOT, Composed, docker

pytestmark = pytest.mark.compose

PORTS = {"gateway": 8000, "scheduler": 9100, "prefill": 9100, "decode": 9100}
DASHBOARD = json.loads((ROOT / "docker/observability/dashboard.json").read_text())
SUFFIX = re.compile("_(total|bucket|count|sum)$")


def served_families(composed: Composed) -> set[str]:
    """The metrics that the services have, by the names in their TYPE lines."""
    found: set[str] = set()
    for service, port in PORTS.items():
        reading = (
            f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
        )
        text = composed.compose("exec", "-T", service, "python", "-c", reading)
        found.update(re.findall(r"^# TYPE (\S+)", text, flags=re.MULTILINE))
    return found


def test_the_dashboard_asks_for_metrics_that_are_there(composed: Composed) -> None:
    composed.up()
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm:|flowkv_)\w+", query)}
    families = served_families(composed)
    missing = {name for name in asked if not {name, SUFFIX.sub("", name)} & families}
    assert len(asked) >= 15
    assert not missing


async def test_prometheus_finds_nodes_that_come(composed: Composed) -> None:
    if "prom/prometheus" not in docker("images", "--format", "{{.Repository}}"):
        pytest.skip("needs the image prom/prometheus")
    composed.up(decode=2)
    composed.compose("--profile", "observability", "up", "--detach", "--no-deps", "prometheus")
    expected = {"gateway": 1, "scheduler": 1, "prefill": 1, "decode": 2}
    url = f"http://{composed.compose('port', 'prometheus', '9090').strip()}"
    up: dict[str, int] = {}
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=url) as http:
        while up != expected:
            await asyncio.sleep(0.5)  # it looks around by itself, and tells nobody
            try:
                shown = (await http.get("/api/v1/targets")).json()["data"]["activeTargets"]
            except httpx.TransportError:
                continue
            up = collections.Counter(one["labels"]["job"] for one in shown if one["health"] == "up")
        values = (await http.get("/api/v1/query", params={"query": "flowkv_usable_nodes"})).json()
        assert values["data"]["result"][0]["value"][1] == "3"
    composed.compose("--profile", "observability", "rm", "--stop", "--force", "prometheus")
