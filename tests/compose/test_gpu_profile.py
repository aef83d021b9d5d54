"""The profile gpu as far as it goes without a GPU: its services, and its nodes with the device exchanged."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.compose.composed import FILES, Composed, docker

pytestmark = pytest.mark.compose

SERVICES = ("prefill-gpu", "decode-gpu")


def test_its_nodes_ask_for_all_gpus_and_claim_one_each() -> None:
    composed = Composed("flowkv-gpu-config", ("compose.yaml",))
    config = json.loads(composed.compose("--profile", "gpu", "config", "--format", "json"))["services"]
    for service in SERVICES:
        node = config[service]
        [device] = node["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"])
        # Without a number: the first that is not locked.
        assert node["environment"]["FLOWKV_DEVICE"] == "cuda"
        assert "sockets" in {volume["source"] for volume in node["volumes"]}
        assert node["pid"] == node["ipc"] == "service:gpu-anchor"
        assert (node["read_only"], node["cap_drop"]) == (True, ["ALL"])
        assert "EXTRAS" in node["build"]["args"]
    plain = json.loads(composed.compose("config", "--format", "json"))["services"]
    assert not {*SERVICES, "gpu-anchor"} & plain.keys()


def test_its_nodes_serve_alone(images: None) -> None:
    variables = {"CPU_NODES": "0", "GPU_DEVICE": "cpu", "GPU_CONNECTORS": "shm,tcp"}
    files = (*FILES, "tests/compose/gpu_on_cpu.yaml")
    with Composed("flowkv-gpu-on-cpu", files, **variables) as composed:
        composed.set(COMPOSE_PROFILES="gpu")
        composed.compose("up", "--detach", "--wait", "--scale", "decode-gpu=2")
        names = ("prefill", "decode", *SERVICES)
        assert [len(composed.containers(name)) for name in names] == [0, 0, 1, 2]
        modes = {
            docker("inspect", "--format", "{{.HostConfig.PidMode}} {{.HostConfig.IpcMode}}", one).strip()
            for service in SERVICES
            for one in composed.containers(service)
        }
        [anchor] = composed.containers("gpu-anchor")
        anchor = docker("inspect", "--format", "{{.Id}}", anchor).strip()
        assert modes == {f"container:{anchor} container:{anchor}"}
        body = {"model": "test-model", "prompt": "The capital of France is", "max_tokens": 4}
        answer = httpx.post(f"{composed.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == 4
