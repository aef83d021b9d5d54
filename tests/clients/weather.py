"""What the clients' tests ask, in words that the scripted model has lines for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = "What is the weather in Paris?"
TYPED_WEATHER = "What is the weather in Paris? Answer as JSON."
SAID = "It is 18 degrees in Paris. Report that."
SAID_AS_JSON = "It is 18 degrees in Paris. Report that as JSON."
BOTH = "What is the weather in Paris and in Tokyo?"
ROME = "What is the weather in Rome?"
THOUGHT = "Think first. What is the weather in Paris?"
SUM = "Think first: what is 17 + 25?"


class Report(BaseModel):
    """The weather in a city."""

    city: Annotated[str, Field(max_length=12)]
    degrees: Annotated[int, Field(ge=-60, le=60)]


PARIS = Report(city="Paris", degrees=18)


def get_weather(city: str) -> str:
    """The weather in a city, now."""
    return f"18 degrees in {city}"


PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS},
}
