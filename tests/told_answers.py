"""What a model that does as it is told answers to the prompts of canitoolcall's probe."""

from __future__ import annotations

import json
from typing import Any


def called(name: str, **arguments: Any) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )


EVENT = {
    "title": "Design review",
    "start": "2026-10-01T15:00:00Z",
    "attendees": [{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}],
    "location": {"city": "Berlin", "room": "4.12"},
}
PARIS = called("get_weather", city="Paris")
# By words of the prompt, the first that are found: what a model that does as it is told answers.
ANSWERS = {
    "<tool_response>": "It is 18 degrees.",
    "Paris and in Tokyo": f"{PARIS}\n{called('get_weather', city='Tokyo')}",
    "weather in Paris": PARIS,
    "17 + 25": "42",
    "Design review": called("create_event", **EVENT),
    "Z\u00fcrich": called(
        "save_note",
        title="Gr\u00fc\u00dfe aus Z\u00fcrich",
        body="Caf\u00e9 \u2615 in \u6771\u4eac \u2014 na\u00efve r\u00e9sum\u00e9 \U0001f680",
    ),
    "What time": called("get_server_time"),
    "Lisbon": called("get_weather", city="Lisbon"),
    "9.11": f"<think>\nBy its digits.\n</think>\n\n{called('record_answer', answer='9.9')}",
}
