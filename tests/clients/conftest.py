"""What the clients talk to, and what is kept of each test for the table."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Served(NamedTuple):
    """A running cluster. `root` is where its HTTP API begins, `url` where OpenAI's part of it does."""

    root: str
    model: str

    @property
    def url(self) -> str:
        return f"{self.root}/v1"


@pytest.fixture(scope="session")
def model() -> Served:
    """SmolLM2-135M, one prefill and one decode node, as `flowkv up` starts them."""
    return Served(os.environ["FLOWKV_CLIENTS_MODEL"], "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def scripted() -> Served:
    """A model that says what `script.py` has."""
    return Served(os.environ["FLOWKV_CLIENTS_SCRIPTED"], "scripted")


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients won't start without, even where they are given one."""
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "none")


def _tried(item: pytest.Item) -> str:
    """In words: its name, or that of its case."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = str(parameters.get("case", item.originalname))
    return name.removeprefix("test_").strip("_").replace("_", " ")


_outcomes: list[dict[str, Any]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    client = item.get_closest_marker("client")
    if report.when == "call" or report.failed:
        assert client is not None, f"{item.nodeid} is of no client"
        name, *others = client.args
        _outcomes.append(
            {
                "client": name,
                "version": others[0] if others else version(name),
                "tried": _tried(item),
                "outcome": "xfailed" if hasattr(report, "wasxfail") else report.outcome,
                "reason": getattr(report, "wasxfail", ""),
            }
        )
    return report


def pytest_sessionfinish() -> None:
    if path := os.environ.get("FLOWKV_CLIENTS_OUTCOMES"):
        Path(path).write_text(json.dumps(_outcomes, indent=1))
