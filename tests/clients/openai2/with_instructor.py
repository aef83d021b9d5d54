"""instructor in its modes."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID, SAID_AS_JSON, Report

pytestmark = pytest.mark.client("instructor")


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON"])
def test_create_in_five_modes(model: Served, scripted: Served, mode: str) -> None:
    def create(served: Served, **fields: Any) -> Any:
        client = instructor.from_openai(
            openai.OpenAI(base_url=served.url, api_key="none"), mode=instructor.Mode[mode]
        )
        words = SAID if mode.startswith("TOOLS") else SAID_AS_JSON
        messages: Any = [{"role": "user", "content": words}]
        return client.chat.completions.create(
            model=served.model, messages=messages, response_model=Report, max_retries=0, **fields
        )

    assert create(scripted).model_dump() == PARIS.model_dump()
    if mode not in ("JSON", "MD_JSON"):  # there a small model is only asked to keep to the schema
        assert isinstance(create(model, max_tokens=80, temperature=0), Report)


def test_partial_stream(scripted: Served) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=scripted.url, api_key="none"))
    messages: Any = [{"role": "user", "content": SAID}]
    parts = list(
        client.chat.completions.create_partial(
            model=scripted.model, messages=messages, response_model=Report, max_retries=0
        )
    )
    assert len(parts) > 1
    assert parts[-1].model_dump() == PARIS.model_dump()
