"""The chart rendered by Helm's own code, and what is asked of all that it renders."""

from __future__ import annotations

import base64
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import helm_python
import yaml

from tests.deploy.chart_files import CHART

RELEASE, NAMESPACE = "llm", "serving"

Manifest = dict[str, Any]
Values = dict[str, Any]


class Pod(NamedTuple):
    """The pods that a manifest makes."""

    owner: str  # kind/name
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Those that run at the start, too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """Numbers by name."""
        listed = itertools.chain.from_iterable(one.get("ports", []) for one in self.containers)
        return {port["name"]: port["containerPort"] for port in listed}

    @property
    def ranges(self) -> list[range]:
        """All that it listens on: of some ports it takes one, which is not declared."""
        environ = variables(self.spec["containers"][0])
        settings = [environ[name] for name in ("FLOWKV_HTTP_PORT", "FLOWKV_DATA_PORT") if name in environ]
        return [
            *(range(port, port + 1) for port in self.ports.values()),
            *(ports(setting) for setting in settings),
        ]

    @property
    def secrets(self) -> set[str]:
        """Names of the Secrets that it mounts or has in its environment."""
        volumes = [one["secret"]["secretName"] for one in self.spec.get("volumes", []) if "secret" in one]
        variables = itertools.chain.from_iterable(one.get("env", []) for one in self.containers)
        sources = [one["valueFrom"] for one in variables if "valueFrom" in one]
        return {*volumes, *(one["secretKeyRef"]["name"] for one in sources if "secretKeyRef" in one)}


def render(values: Values, chart: Path = CHART, release: str = RELEASE) -> list[Manifest]:
    """Raises `helm_python.HelmError` when the schema or a template refuses the values."""
    with helm_python.Chart.load(str(chart)) as loaded:
        loaded.validate_schema(values)
        files = loaded.render(values, name=release, namespace=NAMESPACE)
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def with_nats_chart(folder: Path, nats: Path) -> Path:
    """A copy of the chart in `folder` that has the dependency `nats`, a chart's folder."""
    copy = folder / "flowkv"
    shutil.copytree(CHART, copy)
    shutil.copytree(nats, copy / "charts" / "nats")
    return copy


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    for one in manifests:
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            template = one["spec"]["template"]
            owner = f"{one['kind']}/{one['metadata']['name']}"
            yield Pod(owner, template["metadata"]["labels"], template["spec"])
        elif one["kind"] == "Pod":
            yield Pod(f"Pod/{one['metadata']['name']}", one["metadata"]["labels"], one["spec"])


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def secrets_of(manifests: list[Manifest]) -> dict[str, dict[str, str]]:
    """What the Secrets hold, by their names."""
    return {
        one["metadata"]["name"]: {key: base64.b64decode(text).decode() for key, text in one["data"].items()}
        for one in of_kind(manifests, "Secret")
    }


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    [found] = [one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name]
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes finds `labels`."""
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for rule in selector.get("matchExpressions", []):
        is_in = labels.get(rule["key"]) in rule["values"]
        if is_in != {"In": True, "NotIn": False}[rule["operator"]]:
            return False
    return True


def ports(setting: str) -> range:
    """Of 9201, or of 9201-9299."""
    first, _, last = setting.partition("-")
    return range(int(first), int(last or first) + 1)


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    """Its environment; what only the cluster knows is an address."""
    return {one["name"]: one.get("value", "10.0.0.1") for one in container.get("env", [])}
