"""What the scripted model answers: the first line all of whose words are in the prompt.

The clients' tests ask in these words. A line for a later step has the words of the step before, so it stands
before that.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tests.told_answers import ANSWERS, PARIS, called

NO_LINE = "The script has no line for this."
REPORT = {"city": "Paris", "degrees": 18}


class Line(NamedTuple):
    words: tuple[str, ...]
    answer: str


def _call_of(name: str) -> tuple[Line, Line]:
    """Where the report is asked for as a call of this function, after the weather if that can be had."""
    named, report = f'"name": "{name}"', called(name, **REPORT)
    return Line((named, "<tool_response>"), report), Line((named, "18 degrees in Paris"), report)


LINES = (
    # Coding agents: their prompts have most words, so theirs come first.
    Line(("Count the files here", "<tool_response>", "FILES=1"), "There is 1 file."),
    Line(
        ("Count the files here", '"name": "exec_command"'),
        called("exec_command", cmd="echo FILES=$(ls *.txt | wc -l)"),
    ),
    Line(
        ("Count the files here", '"name": "Bash"'),
        called("Bash", command="echo FILES=$(ls *.txt | wc -l)", description="Counts the files"),
    ),
    # Names by which clients ask for typed output with a call.
    *_call_of("final_result"),
    *_call_of("Report"),
    *_call_of("PartialReport"),
    *_call_of("json"),
    Line(("as JSON", "<tool_response>"), json.dumps(REPORT)),
    Line(("as JSON", "18 degrees in Paris"), json.dumps(REPORT)),
    Line(("Think first", "17 + 25"), "<think>\nTen and thirty, two more.\n</think>\n\n42"),
    # What the model has thought must come back to it.
    Line(("Think first. What is the weather in Paris", "<tool_response>", "I ask."), "It is 18 degrees."),
    Line(("Think first. What is the weather in Paris", "<tool_response>"), "What did I think?"),
    Line(("Think first. What is the weather in Paris",), f"<think>\nI ask.\n</think>\n\n{PARIS}"),
    # An agent that gives its chat to another one.
    Line(("hand me over", "<tool_response>"), "Handed over: hello."),
    Line(("hand me over", "transfer_to_greeter"), called("transfer_to_greeter")),
    # Two calls at once, and a third step after a tool that asks to be called again.
    Line(("Paris and in Tokyo", "18 degrees in Paris", "18 degrees in Tokyo"), "It is 18 degrees in both."),
    Line(("Rome", "Use the full name", "18 degrees in Roma"), "It is 18 degrees."),
    Line(("Rome", "Use the full name"), called("get_weather", city="Roma")),
    Line(("weather in Rome",), called("get_weather", city="Rome")),
    *(Line((words,), answer) for words, answer in ANSWERS.items()),
    Line(("Hello",), "Hello! How can I help?"),
)


def answer_to(prompt: str) -> str:
    """`prompt` is the rendered conversation."""
    return next((line.answer for line in LINES if all(word in prompt for word in line.words)), NO_LINE)
