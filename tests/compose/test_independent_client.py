"""Discovery, buckets and messages as the official JavaScript client sees them: no code of ours is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.wire import subjects
from tests.compose.composed import Composed

pytestmark = pytest.mark.compose

FOLDER = Path(__file__).with_name("interop")
PER_NODE = ("prefill", "decode", "node")


@pytest.fixture(scope="module")
def seen(composed: Composed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js with npm")
    composed.up(scheduler=2)
    folder = Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("interop") / "client"))
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=180
    )
    command = ["node", "look.mjs", composed.nats_url]
    looked = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(looked.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", ["ping", "info", "stats"])
def test_all_services_are_discovered(seen: dict[str, Any], verb: str) -> None:
    found = sorted(reply["name"] for reply in seen[verb])
    assert found == sorted(["gateway", "scheduler", "scheduler", *PER_NODE, *PER_NODE])
    assert {reply["type"] for reply in seen[verb]} == {f"io.nats.micro.v1.{verb}_response"}


def test_one_scheduler_leads_and_has_the_endpoint(seen: dict[str, Any]) -> None:
    schedulers = [reply for reply in seen["info"] if reply["name"] == "scheduler"]
    assert sorted(one["metadata"]["state"] for one in schedulers) == ["leader", "standby"]
    [leader] = [one for one in schedulers if one["endpoints"]]
    assert leader["endpoints"][0]["subject"] == subjects.SCHEDULE
    assert seen["leader"]["leader"]["scheduler_id"] == leader["id"]


def test_the_registry_is_json(seen: dict[str, Any]) -> None:
    assert sorted(record["role"] for record in seen["nodes"].values()) == ["decode", "prefill"]
    for key, record in seen["nodes"].items():
        assert record["node"]["node_id"] == key


def test_messages_are_json_that_names_its_type(seen: dict[str, Any]) -> None:
    assert len(seen["messages"]) == 20
    reports = [message for message in seen["messages"] if message["subject"].startswith("flowkv.v1.load.")]
    assert {message["type"] for message in reports} == {"LoadReport"}
