"""outlines by its backends for OpenAI and for vLLM."""

from __future__ import annotations

from typing import Any, Literal

import openai
import outlines
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID_AS_JSON, Report

pytestmark = pytest.mark.client("outlines")


@pytest.fixture(params=[outlines.from_openai, outlines.from_vllm])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def connect(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none")


def test_json(make: Any, model: Served, scripted: Served) -> None:
    found = make(connect(scripted), scripted.model)(SAID_AS_JSON, Report)
    assert Report.model_validate_json(found) == PARIS
    Report.model_validate_json(
        make(connect(model), model.model)(SAID_AS_JSON, Report, max_tokens=60, temperature=0)
    )


def test_choice(model: Served) -> None:
    ask = outlines.from_vllm(connect(model), model.model)
    assert ask("What is the capital of France?", Literal["Paris", "London"]) in ("Paris", "London")


def test_regex(model: Served) -> None:
    ask = outlines.from_vllm(connect(model), model.model)
    found = ask("A date?", outlines.types.regex(r"20[0-9]{2}-[01][0-9]"), max_tokens=20, temperature=0)
    assert len(str(found)) == 7
