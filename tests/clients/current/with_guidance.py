"""guidance by its experimental model for vLLM."""

from __future__ import annotations

from typing import Any

import guidance
import pytest
from guidance.models import experimental

from tests.clients.conftest import Served
from tests.clients.weather import Report

pytestmark = pytest.mark.client("guidance")


def ask(served: Served) -> Any:
    return experimental.VLLMModel(served.model, base_url=served.url, api_key="none")


def test_select(model: Served) -> None:
    with guidance.user():
        found = ask(model) + "What is the capital of France?"
    with guidance.assistant():
        found += guidance.select(["Paris", "London"], name="city")
    assert found["city"] in ("Paris", "London")


def test_json(model: Served) -> None:
    with guidance.user():
        found = ask(model) + "The weather?"
    with guidance.assistant():
        found += guidance.json(name="report", schema=Report)
    Report.model_validate_json(found["report"])
