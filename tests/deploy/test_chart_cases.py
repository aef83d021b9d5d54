"""What single values of the chart do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import helm_python
import nats.errors
import pytest

from flowkv.accounts import RIGHTS
from flowkv_common import __version__
from flowkv_common.wire.limits import MAX_PAYLOAD_BYTES
from tests.deploy.chart import RELEASE, named, of_kind, pods, render, secrets_of, variables
from tests.deploy.chart_files import (
    ACCOUNTS,
    CHART,
    README,
    VALUES,
    accounts_from_code,
    page_from_values,
    undocumented,
)
from tests.deploy.conftest import CASES, OWN_NATS
from tests.nats_server import NatsServer, log_in

ROOT = CHART.parents[2]
TLS = CASES["certificates"]
REFUSED: dict[str, dict[str, Any]] = {
    "an unknown value": {"gate": {}},
    "an unknown part": {"gateway": {"replica": 2}},
    "no gateway": {"gateway": {"replicas": 0}},
    "a tag that moves": {"images": {"control": {"tag": "latest"}}},
    "no limits": {"nodes": {"resources": {"limits": None}}},
    "no model": {"models": []},
    "a name that no object may have": {"models": [{"name": "Qwen3", "source": "Qwen/Qwen3-8B"}]},
    "a setting in upper case": {"nodes": {"settings": {"FLOWKV_NUM_THREADS": 2}}},
    "a setting that is a list": {"nodes": {"settings": {"connectors": ["shm", "tcp"]}}},
    "a port that is none": {"nodes": {"prefill": {"dataPort": "9201-"}}},
    "two copies": {"bus": {"replicas": 2}},
    "an unknown storage": {"bus": {"storage": "disk"}},
    "a route without a Gateway": {"gateway": {"route": {"enabled": True}}},
    "TLS for no host": {"gateway": {"ingress": {"enabled": True, "tlsSecret": "tls"}}},
    "a folder that is no path": {"nodes": {"socketsHostPath": "run"}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_schema_refuses(what: str) -> None:
    with pytest.raises(helm_python.HelmError):
        render(OWN_NATS | REFUSED[what])


def test_nodes_on_the_host_network_need_its_addresses() -> None:
    with pytest.raises(helm_python.HelmError, match="hostCidrs"):
        render(OWN_NATS | {"nodes": {"hostNetwork": True}})


def test_the_schema_is_not_what_refuses_the_rest() -> None:
    assert render(OWN_NATS)


def test_written_files_agree_with_their_sources() -> None:
    assert README.read_text(encoding="utf-8") == page_from_values(), "python -m tests.deploy.chart_files"
    assert ACCOUNTS.read_text(encoding="utf-8") == accounts_from_code(), "python -m tests.deploy.chart_files"
    assert undocumented(VALUES.read_text(encoding="utf-8")) == []


def test_a_value_without_a_comment_is_found() -> None:
    text = "# said\na: 1\nb:\n  c: 2\n  # said\n  d: {e: 3}\n"
    assert undocumented(text) == ["b.c"]


def test_helm_finds_nothing_to_mend(chart: Path) -> None:
    found = helm_python.lint(str(chart))
    assert [one for one in found["messages"] if one["error"] != "icon is recommended"] == []


def test_the_chart_has_the_version_of_the_code() -> None:
    with helm_python.Chart.load(str(CHART)) as chart:
        assert chart.version == __version__
        assert chart.values["nats"]["config"]["merge"]["max_payload"] == MAX_PAYLOAD_BYTES


def test_large_numbers_are_whole() -> None:
    """Helm reads them as floats: 1.073741824e+09 is no setting."""
    node = named(render(OWN_NATS), "Deployment", f"{RELEASE}-smollm2-decode")
    environ = variables(node["spec"]["template"]["spec"]["containers"][0])
    assert environ["FLOWKV_KV_CACHE_BYTES"] == "1073741824"


def test_a_gpu_node() -> None:
    manifests = render(OWN_NATS | CASES["GPUs on the host's network"])
    for role in ("prefill", "decode"):
        deployment = named(manifests, "Deployment", f"{RELEASE}-qwen3-8b-{role}")["spec"]
        spec = deployment["template"]["spec"]
        [container] = spec["containers"]
        environ = variables(container)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
        assert spec["runtimeClassName"] == "nvidia"
        assert (environ["NCCL_SOCKET_IFNAME"], environ["NCCL_IB_HCA"]) == ("eth0", "mlx5")
        assert (environ["FLOWKV_DEVICE"], environ["FLOWKV_CONNECTORS"]) == ("cuda:0", "nccl")
        # The port of the old pod is free only when that has ended.
        assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert [pod.ports for pod in pods(manifests) if "flowkv/role" in pod.labels] == [
        {"http": 9111, "kv": 9201},
        {},  # ranges: several find room on one host
    ]


def test_a_model_may_differ_in_its_nodes() -> None:
    manifests = render(OWN_NATS | CASES["two models"])
    for name, has_gpu in (("smollm2", False), ("big", True)):
        spec = named(manifests, "Deployment", f"{RELEASE}-{name}-prefill")["spec"]["template"]["spec"]
        [container] = spec["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == has_gpu
        assert (variables(container).get("FLOWKV_DEVICE") == "cuda:0") == has_gpu


def test_another_source_is_another_job_and_another_link() -> None:
    def job_and_link(source: str) -> tuple[str, str]:
        manifests = render(OWN_NATS | {"models": [{"name": "chat", "source": source}]})
        [job] = of_kind(manifests, "Job")
        return job["metadata"]["name"], job["spec"]["template"]["spec"]["containers"][0]["args"][-1]

    (job, link), (other_job, other_link) = job_and_link("org/a"), job_and_link("org/b")
    assert (job, link) == job_and_link("org/a")
    assert job != other_job
    assert link != other_link


def test_scaling_follows_what_the_scheduler_wants(chart: Path) -> None:
    manifests = render(CASES["monitored and scaled"], chart)
    objects = of_kind(manifests, "ScaledObject")
    assert len(objects) == 2
    for one in objects:
        target = named(manifests, "Deployment", one["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"]  # or an upgrade would set it back
        [trigger] = one["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        role = target["spec"]["template"]["metadata"]["labels"]["flowkv/role"]
        assert f'role="{role}"' in query
        assert set(re.findall(r"flowkv_\w+", query)) == {
            "flowkv_max_prefill_tokens_per_step",
            "flowkv_scale_wanted",
        }
    monitors = of_kind(manifests, "ServiceMonitor")
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        [service] = [
            one for one in of_kind(manifests, "Service") if wanted <= one["metadata"]["labels"].items()
        ]
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
        assert monitor["metadata"]["labels"]["prometheus"] == "main"
    jobs = [one["spec"]["endpoints"][0]["relabelings"][0]["replacement"] for one in monitors]
    assert sorted(jobs) == ["decode", "gateway", "prefill", "scheduler"]
    [board] = [one for one in of_kind(manifests, "ConfigMap") if "flowkv.json" in one["data"]]
    assert board["data"]["flowkv.json"] == (ROOT / "docker/observability/dashboard.json").read_text()
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.fixture(scope="module")
def accounts(chart: Path) -> dict[str, dict[str, str]]:
    """What the chart's Secrets hold, by their names."""
    return secrets_of(render({}, chart))


def test_each_user_has_a_password_of_its_own(accounts: dict[str, dict[str, str]]) -> None:
    assert accounts.keys() == {f"{RELEASE}-nats-{user}" for user in (*RIGHTS, "server")}
    passwords = {secret.get("password-1") or secret["password"] for secret in accounts.values()}
    assert len(passwords) == len(accounts)
    for user in RIGHTS:
        secret = accounts[f"{RELEASE}-nats-{user}"]
        urls = [urlsplit(url) for url in secret["nats_url"].split(",")]
        assert {(url.username, url.password) for url in urls} == {(user, secret["password-1"])}
        addresses = [f"{RELEASE}-nats-{n}.{RELEASE}-nats-headless:4222" for n in range(3)]
        assert [url.netloc.rpartition("@")[2] for url in urls] == addresses


def test_a_certificate_stands_in_for_the_password(chart: Path) -> None:
    secrets = secrets_of(render(TLS, chart))
    for user in RIGHTS:
        [url, *_] = secrets[f"{RELEASE}-nats-{user}"]["nats_url"].split(",")
        assert url == f"tls://{RELEASE}-nats-0.{RELEASE}-nats-headless:4222"
    users = json.loads(secrets[f"{RELEASE}-nats-server"]["accounts.conf"])["authorization"]["users"]
    assert [one["user"] for one in users] == list(RIGHTS)
    assert not any("password" in one for one in users)


def test_services_with_certificates_need_a_server_with_one(chart: Path) -> None:
    with pytest.raises(helm_python.HelmError, match="values/tls.yaml"):
        render({"tls": {"enabled": True}}, chart)


def test_no_passwords_are_made_for_a_nats_of_your_own() -> None:
    assert of_kind(render(OWN_NATS), "Secret") == []


async def test_nats_takes_the_accounts(accounts: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """A real server, with the includes of values.yaml: each user gets in, others don't."""
    server = accounts[f"{RELEASE}-nats-server"]
    for name in ("accounts.conf", "cluster.conf"):
        (tmp_path / name).write_text(server[name])
    config = tmp_path / "nats.conf"
    config.write_text(
        "include ./accounts.conf;\n"
        '"cluster": {\n"name": "flowkv",\n"port": -1,\n"routes": ["nats://other:6222"],\n'
        "include ./cluster.conf;\n}\n"
    )
    with NatsServer("-c", str(config), "--name", "one") as running:
        address = running.url.removeprefix("nats://")
        for user in RIGHTS:
            password = accounts[f"{RELEASE}-nats-{user}"]["password-1"]
            await log_in(f"nats://{user}:{password}@{address}")
        with pytest.raises(nats.errors.Error, match="Authorization"):
            await log_in(f"nats://gateway:guess@{address}")
    routes = json.loads(server["cluster.conf"])["routes"]
    assert len(routes) == 3
    assert all(f"server:{server['password']}@" in route for route in routes)
