"""What holds for all that the chart renders, whatever the values."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flowkv_common import health
from flowkv_common.config import (
    GatewaySettings,
    NodeSettings,
    SchedulerSettings,
    ServiceSettings,
    load_settings,
)
from tests.deploy.chart import RELEASE, Manifest, Pod, named, of_kind, pods, ports, selects, variables

# Kinds that a cluster has only with an operator: Kubernetes' own schemas don't tell of them.
OF_OPERATORS = ("ServiceMonitor", "ScaledObject", "HTTPRoute")
# Which Secrets the pods of a component may see; others none.
SECRETS = {
    "gateway": {f"{RELEASE}-nats-gateway", f"{RELEASE}-tls-gateway", "keys", "llm-tls"},
    "scheduler": {f"{RELEASE}-nats-scheduler", f"{RELEASE}-tls-scheduler"},
    "prefill": {f"{RELEASE}-nats-node", f"{RELEASE}-tls-node"},
    "decode": {f"{RELEASE}-nats-node", f"{RELEASE}-tls-node"},
    "models": {"hub"},
    "nats": {f"{RELEASE}-nats-server", f"{RELEASE}-tls-nats"},
    "test": {"keys"},
}
SETTINGS: dict[str, type[ServiceSettings]] = {
    "flowkv_gateway": GatewaySettings,
    "flowkv_scheduler": SchedulerSettings,
    "flowkv_prefill": NodeSettings,
    "flowkv_decode": NodeSettings,
}


def services(manifests: list[Manifest]) -> list[tuple[Pod, dict[str, Any], type[ServiceSettings]]]:
    """Pods of FlowKV's services with the container that serves, and the kind of its settings."""
    return [
        (pod, container, SETTINGS[container["args"][0]])
        for pod in pods(manifests)
        for container in pod.spec["containers"]
        if container.get("args", [""])[0] in SETTINGS
    ]


def test_kubernetes_knows_each_field(manifests: list[Manifest]) -> None:
    """The oldest release that Chart.yaml allows, and the newest whose schemas are at hand."""
    for one in manifests:
        if one["kind"] not in OF_OPERATORS:
            for release in ("1.27", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(one, release, strict=True)


def test_names_are_unique_and_kustomize_builds_them(manifests: list[Manifest], tmp_path: Path) -> None:
    ids = [(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]{1,63}", name) for _, _, name in ids)
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(manifests))
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\nnamespace: other\n")
    command = ["kubectl", "kustomize", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert len(list(yaml.safe_load_all(built))) == len(manifests)


def test_each_secret_is_mounted_only_where_it_is_needed(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        kind = pod.labels.get("flowkv/role", pod.component)
        assert pod.secrets <= SECRETS.get(kind, set()), pod.owner
        assert not pod.spec["automountServiceAccountToken"], pod.owner
        for volume in pod.spec["volumes"]:
            if volume["name"] == "keys":
                assert volume["secret"]["items"] == [{"key": "nats_url", "path": "nats_url"}]


def test_images_have_a_version(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        for container in pod.containers:
            _, _, tag = container["image"].rpartition(":")
            assert re.match(r"v?\d+\.\d+", tag), (pod.owner, container["image"])


def test_containers_have_limits_and_no_more_rights_than_they_need(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        for container in pod.containers:
            where = (pod.owner, container["name"])
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), where
            rights = container["securityContext"]
            assert rights["capabilities"]["drop"] == ["ALL"], where
            assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
            if container["name"] != "own-sockets":
                assert "add" not in rights["capabilities"], where
                assert "runAsUser" not in rights, where
        assert pod.spec["securityContext"]["runAsNonRoot"], pod.owner
        assert pod.spec["securityContext"]["runAsUser"] == 10001, pod.owner
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner


def test_volumes_and_mounts_belong_together(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        volumes = [volume["name"] for volume in pod.spec["volumes"]]
        claims = named(manifests, *pod.owner.split("/"))["spec"].get("volumeClaimTemplates") or []
        mounted = {mount["name"] for one in pod.containers for mount in one.get("volumeMounts", [])}
        assert len(set(volumes)) == len(volumes), pod.owner
        assert mounted == {*volumes, *(claim["metadata"]["name"] for claim in claims)}, pod.owner


def test_probes_ask_ports_that_the_pod_has(manifests: list[Manifest]) -> None:
    for pod, container, _ in services(manifests):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            environ = variables(container)
            if "exec" in container[probe]:
                assert environ["FLOWKV_HTTP_PORT"] in container[probe]["exec"]["command"]
                continue
            asked = container[probe]["httpGet"]
            assert asked["port"] in pod.ports, (pod.owner, probe)
            is_tls = "FLOWKV_TLS_CERT" in environ
            assert asked["scheme"] == ("HTTPS" if is_tls else "HTTP"), (pod.owner, probe)


def test_services_take_the_settings_and_have_time_to_drain(manifests: list[Manifest], tmp_path: Path) -> None:
    """Each variable is a setting of its service, or the service would not start."""
    url_file = tmp_path / "nats_url"
    url_file.write_text("nats://flowkv:secret@nats:4222\n")
    found = services(manifests)
    assert len(found) >= 4
    for pod, container, kind in found:
        environ = variables(container)
        assert environ["FLOWKV_NATS_URL_FILE"] == "/keys/nats_url"
        settings = load_settings(kind, [], environ | {"FLOWKV_NATS_URL_FILE": str(url_file)})
        drain_s = getattr(settings, "drain_timeout_s", 0.0) + getattr(settings, "shutdown_delay_s", 0.0)
        assert pod.spec["terminationGracePeriodSeconds"] >= max(drain_s + 5, 40), pod.owner
        assert not pod.spec["enableServiceLinks"], pod.owner  # else variables FLOWKV_... that it refuses
        port = getattr(settings, "port" if kind is GatewaySettings else "http_port")
        assert ports(str(port)) in pod.ranges, pod.owner
        assert pod.ports.get("http") in (None, *ports(str(port))), pod.owner
        if isinstance(settings, NodeSettings):
            assert settings.num_threads <= int(container["resources"]["limits"]["cpu"])
            assert bool(settings.data_tls_cert) == bool(settings.nats_cert)
            assert settings.host == "0.0.0.0"
            assert settings.advertise_host


def test_nodes_read_what_the_job_of_their_model_links(manifests: list[Manifest]) -> None:
    jobs = [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in of_kind(manifests, "Job")]
    links = {args[args.index("--link") + 1] for args in jobs}
    assert len(links) == len(jobs) >= 1
    for pod, container, kind in services(manifests):
        if kind is not SchedulerSettings:
            paths = set(variables(container)["FLOWKV_MODEL_PATH"].split(","))
            assert paths == links if kind is GatewaySettings else paths <= links, pod.owner
            waits = [one["args"][-1] for one in pod.spec["initContainers"] if "args" in one]
            assert set(waits) == paths, pod.owner


def test_selectors_find_pods(manifests: list[Manifest]) -> None:
    found = list(pods(manifests))
    for service in of_kind(manifests, "Service"):
        backing = [pod for pod in found if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert len(backing) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in backing[0].ports, service["metadata"]["name"]
    budgets = of_kind(manifests, "PodDisruptionBudget")
    covered = {pod.owner for one in budgets for pod in found if selects(one["spec"]["selector"], pod.labels)}
    assert {pod.owner for pod in found if pod.owner.startswith("Deployment/")} <= covered
    for workload in (*of_kind(manifests, "Deployment"), *of_kind(manifests, "StatefulSet")):
        template = workload["spec"]["template"]["metadata"]["labels"]
        assert [pod.owner for pod in found if selects(workload["spec"]["selector"], pod.labels)] == [
            f"{workload['kind']}/{workload['metadata']['name']}"
        ]
        assert selects(workload["spec"]["selector"], template)


def test_network_policies_name_pods_and_ports_that_exist(manifests: list[Manifest]) -> None:
    found = list(pods(manifests))
    policies = of_kind(manifests, "NetworkPolicy")
    guarded: set[str] = set()
    for policy in policies:
        name, spec = policy["metadata"]["name"], policy["spec"]
        targets = [pod for pod in found if selects(spec["podSelector"], pod.labels)]
        assert targets, name
        guarded.update(pod.owner for pod in targets)
        for rule in spec["ingress"]:
            for peer in rule.get("from", []):
                if "podSelector" in peer:
                    assert any(selects(peer["podSelector"], pod.labels) for pod in found), name
            for port in rule.get("ports", []):
                for pod in targets:
                    assert numbers(port, pod) in pod.ranges, (name, port)
    assert guarded == {pod.owner for pod in found}


def numbers(port: dict[str, Any], pod: Pod) -> range:
    """The ports of a pod that a rule is for."""
    first = pod.ports[port["port"]] if isinstance(port["port"], str) else port["port"]
    return range(first, port.get("endPort", first) + 1)


def who_reaches(manifests: list[Manifest], owner: str, number: int) -> set[str]:
    """Pods that the policies let through to a port of a pod; "*" if all may."""
    found = {pod.owner: pod for pod in pods(manifests)}
    target = found[owner]
    reach: set[str] = set()
    for policy in of_kind(manifests, "NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], target.labels):
            continue
        for rule in policy["spec"]["ingress"]:
            if any(number in numbers(one, target) for one in rule.get("ports", [{"port": number}])):
                peers = rule.get("from", [{"podSelector": {}}])
                reach |= {
                    pod.owner
                    for peer in peers
                    for pod in found.values()
                    if "podSelector" in peer and selects(peer["podSelector"], pod.labels)
                }
                if "from" not in rule:
                    reach.add("*")
    return reach


def test_only_who_needs_it_reaches_nats_and_kv(manifests: list[Manifest]) -> None:
    deployments = {pod.owner for pod in pods(manifests) if pod.owner.startswith("Deployment/")}
    nodes = {pod.owner for pod in pods(manifests) if "flowkv/role" in pod.labels}
    for pod in pods(manifests):
        if pod.owner in nodes:
            data_ports = ports(variables(pod.spec["containers"][0])["FLOWKV_DATA_PORT"])
            assert who_reaches(manifests, pod.owner, data_ports[0]) == nodes
            assert who_reaches(manifests, pod.owner, data_ports[-1]) == nodes
    if of_kind(manifests, "StatefulSet"):
        server = f"StatefulSet/{RELEASE}-nats"
        assert who_reaches(manifests, server, 4222) == deployments
        assert who_reaches(manifests, server, 6222) == {server}
        assert who_reaches(manifests, server, 8222) == set()


def test_helm_test_asks_the_gateway_for_a_request_through_each_pair(manifests: list[Manifest]) -> None:
    name = f"{RELEASE}-test"
    pod = named(manifests, "Pod", name)
    assert pod["metadata"]["annotations"] == {"helm.sh/hook": "test"}
    assert pod["spec"]["restartPolicy"] == "Never"
    service = named(manifests, "Service", f"{RELEASE}-gateway")
    gateway = named(manifests, "Deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
    [container], [serving] = pod["spec"]["containers"], gateway["containers"]
    assert container["image"] == serving["image"]
    module, port, path, timeout_s = container["args"]
    assert (module, path) == ("flowkv_common.health", "/health/deep")
    inspect.signature(health.main).bind(port, path, timeout_s)
    environ = variables(container)
    assert (environ["FLOWKV_HOST"], int(port)) == (
        service["metadata"]["name"],
        service["spec"]["ports"][0]["port"],
    )
    assert float(timeout_s) < pod["spec"]["activeDeadlineSeconds"]
    for setting in ("FLOWKV_TLS_CERT", "FLOWKV_API_KEYS_FILE"):
        assert environ.get(setting) == variables(serving).get(setting)
    reach = who_reaches(manifests, f"Deployment/{RELEASE}-gateway", 8000)
    assert reach & {"*", f"Pod/{name}"}
    assert "Pod/" not in str(who_reaches(manifests, f"Pod/{name}", 8000))


def test_routes_lead_to_the_gateway(manifests: list[Manifest]) -> None:
    [port] = named(manifests, "Service", f"{RELEASE}-gateway")["spec"]["ports"]
    backends = [
        path["backend"]["service"]
        for ingress in of_kind(manifests, "Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    assert all(one == {"name": f"{RELEASE}-gateway", "port": {"name": port["name"]}} for one in backends)
    references = [
        reference
        for route in of_kind(manifests, "HTTPRoute")
        for rule in route["spec"]["rules"]
        for reference in rule["backendRefs"]
    ]
    assert all(one == {"name": f"{RELEASE}-gateway", "port": port["port"]} for one in references)
