"""The values that users choose among, each rendered once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import Manifest, Values, render, with_nats_chart
from tests.deploy.chart_files import CHART

OWN_NATS: Values = {"nats": {"enabled": False}, "bus": {"replicas": 1, "namespace": "team-a"}}
GPU: Values = {
    "enabled": True,
    "ncclSocketIfname": "eth0",
    "ncclEnv": {"NCCL_IB_HCA": "mlx5"},
}
CASES: dict[str, Values] = {
    "default": {},
    "own NATS": OWN_NATS,
    "GPUs on the host's network": {
        "nodes": {
            "gpu": GPU,
            "hostNetwork": True,
            "decode": {"httpPort": "9150-9199", "dataPort": "9250-9299"},
            "resources": {"requests": {"cpu": "8"}, "limits": {"cpu": "8", "memory": "64Gi"}},
            "nodeSelector": {"nvidia.com/gpu.present": "true"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "models": [{"name": "qwen3-8b", "source": "Qwen/Qwen3-8B"}],
        "modelJob": {"hfTokenSecret": "hub"},
        "networkPolicies": {"hostCidrs": ["10.0.0.0/16"]},
    },
    "two models": {
        "models": [
            {"name": "smollm2", "source": ""},
            {"name": "big", "source": "org/big", "servedName": "big", "nodes": {"gpu": GPU}},
        ],
        "modelVolume": {"accessMode": "ReadWriteMany"},
    },
    "shared memory": {
        "nodes": {
            "socketsHostPath": "/run/flowkv",
            "settings": {"connectors": "shm,tcp"},
            "decode": {"dataPort": "9201-9299"},
        },
        "gateway": {"settings": {"max_body_bytes": 8388608, "live_page": "off", "ping_s": 2.5}},
    },
    "ingress and TLS": {
        "gateway": {
            "apiKeysSecret": "keys",
            "tlsSecret": "llm-tls",
            "ingress": {"enabled": True, "className": "nginx", "host": "llm.example", "tlsSecret": "llm-tls"},
        },
        "networkPolicies": {"clients": [{"namespaceSelector": {}}]},
        "monitoring": {"serviceMonitors": True},
    },
    "certificates": yaml.safe_load((CHART / "values" / "tls.yaml").read_text()),
    "route": {
        "gateway": {
            "route": {"enabled": True, "parent": {"name": "web"}, "hostnames": ["llm.example"]},
            "service": {"type": "LoadBalancer", "port": 80},
        },
    },
    "monitored and scaled": {
        "monitoring": {"serviceMonitors": True, "dashboard": True, "labels": {"prometheus": "main"}},
        "scaling": {"enabled": True, "maxReplicas": 4},
    },
}


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart with its dependency: a stub, or the official NATS chart where NATS_CHART names its folder."""
    nats = os.environ.get("NATS_CHART") or Path(__file__).with_name("stub_nats")
    return with_nats_chart(tmp_path_factory.mktemp("chart"), Path(nats))


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def manifests(case: str, chart: Path) -> list[Manifest]:
    return render(CASES[case], chart)
