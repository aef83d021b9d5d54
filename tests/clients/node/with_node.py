"""Clients for Node: each exported function of a file is a case."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CLIENTS = {"openai.mjs": "openai", "anthropic.mjs": "@anthropic-ai/sdk", "ai.mjs": "ai"}
PINS = json.loads((HERE / "package.json").read_text())["dependencies"]


def cases() -> Iterator[Any]:
    for file, package in CLIENTS.items():
        marks = pytest.mark.client(f"{package} (Node)", PINS[package])
        for name in re.findall(r"^export async function (\w+)", (HERE / file).read_text(), re.MULTILINE):
            yield pytest.param(file, name, marks=marks)


@pytest.mark.parametrize(("file", "case"), cases())
def test_node(file: str, case: str) -> None:
    done = subprocess.run(
        ["node", "run.mjs", file, case], cwd=HERE, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
