"""How a line looks, to people and to machines."""

from __future__ import annotations

import json
import logging

import pytest

from flowkv_common.telemetry import JsonLogLines, LogLines

FIELDS: dict[str, object] = {"status": 200, "prefill_node": "p0", "reason": None, "finish_reason": ""}


@pytest.fixture
def record() -> logging.LogRecord:
    made = logging.LogRecord("flowkv", logging.INFO, "file.py", 1, "request %s", ("ended",), None)
    made.__dict__["fields"] = FIELDS
    return made


def test_fields_are_keys_of_the_json_line(record: logging.LogRecord) -> None:
    line = json.loads(JsonLogLines("gateway").format(record))
    assert line.pop("time")
    assert line == {
        "level": "info",
        "service": "gateway",
        "logger": "flowkv",
        "message": "request ended",
        "status": 200,
        "prefill_node": "p0",
    }


def test_fields_stand_behind_the_message_on_a_terminal(record: logging.LogRecord) -> None:
    assert LogLines("gateway").format(record).endswith(" request ended status=200 prefill_node=p0")
