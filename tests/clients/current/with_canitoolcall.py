"""The probe of `canitoolcall`, as its command line runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.clients.conftest import Served

pytestmark = pytest.mark.client("canitoolcall")


def test_probe(scripted: Served) -> None:
    command = [sys.executable, "-m", "canitoolcall", "probe"]
    done = subprocess.run(
        [*command, "--base-url", scripted.url, "--model", scripted.model],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "27 pass, 0 fail" in done.stdout
