"""The boundaries between the parts hold: who may import whom, and that the small services stay small."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "numpy")
# Says which of the modules named in its arguments are loaded after the first of them was imported.
PROBE = (
    "import importlib, sys\n"
    "importlib.import_module(sys.argv[1])\n"
    "print(*(name for name in sys.argv[2:] if name in sys.modules))"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def loaded_by(module: str, watched: tuple[str, ...]) -> list[str]:
    """Those of `watched` that importing `module` loads, in a process of its own."""
    done = python("-c", PROBE, module, *watched)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_imports_keep_to_the_contracts_of_pyproject() -> None:
    done = python(
        "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache", "--no-logo"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in done.stdout


@pytest.mark.parametrize("module", ["flowkv_gateway.__main__", "flowkv_scheduler.__main__"])
def test_services_without_a_model_load_no_engine(module: str) -> None:
    assert loaded_by(module, HEAVY) == []


def test_the_probe_sees_what_a_module_loads() -> None:
    assert loaded_by("flowkv_common.wire.messages", ("msgspec", "nats")) == ["msgspec"]
