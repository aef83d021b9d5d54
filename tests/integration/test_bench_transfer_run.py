"""The transfer benchmark as a user runs it, on its smallest configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_PIECES = 2 * 30  # K and V of each layer of SmolLM2, for the one block of 16 tokens
NUM_BYTES = 720 << 10


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "transfer.json"
    arguments = ["--tokens", "16", "--shape", "smollm2", "--connectors", "shm", "tcp", "--repeat", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "transfer", "--json", str(path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.mark.parametrize("connector", ["shm", "tcp"])
def test_counts_are_exact(document: dict[str, Any], connector: str) -> None:
    rows = {row["strategy"]: row for row in document["rows"] if row["connector"] == connector}
    assert {name: row["num_copies"] for name, row in rows.items()} == {
        "layer-one": NUM_PIECES,
        "layer-batch": NUM_PIECES,
        "block": 1,
        "segments": 1,
        "aligned": 1,
        "fresh": 1,
    }
    assert rows["layer-one"]["num_calls"] == rows["layer-batch"]["num_calls"] == NUM_PIECES
    assert rows["fresh"]["num_calls"] == 1
    assert {row["num_bytes"] for row in rows.values()} == {NUM_BYTES}


def test_the_document_says_on_what_it_was_measured(document: dict[str, Any]) -> None:
    assert document["remarks"] == []
    assert {"commit", "date", "host", "load_average", "conditions"} <= document.keys()
    assert document["host"]["num_cores"] > 0
    for row in document["rows"]:
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        took, memcpy = row["ms"]["median"], row["memcpy_ms"]["median"]  # rounded to a microsecond
        rounding = 0.0006 / took + 0.0006 / memcpy
        assert row["ratio_to_memcpy"] == pytest.approx(took / memcpy, rel=rounding)
