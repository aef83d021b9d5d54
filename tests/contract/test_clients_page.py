"""docs/clients.md has the clients of the suite in the versions that are pinned: `make clients` writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tests.clients.page import BEGIN, END, PAGE, Outcome, table

CLIENTS = PAGE.parents[1] / "tests" / "clients"
NODE_CLIENTS = {
    "node": ("openai", "@anthropic-ai/sdk", "ai"),
    "agents": ("@anthropic-ai/claude-code", "@openai/codex"),
}


def pinned() -> Iterator[tuple[str, str]]:
    """Name and version of each client that has tests."""
    for file in CLIENTS.glob("*/with_*.py"):
        for name in re.findall(r'mark\.client\("([^"]+)"\)', file.read_text()):
            pins = file.with_name("requirements.txt").read_text()
            [version] = re.findall(rf"^{re.escape(name)}==(\S+)", pins, re.MULTILINE)
            yield name, version
    for folder, names in NODE_CLIENTS.items():
        packages = json.loads((CLIENTS / folder / "package.json").read_text())["dependencies"]
        for name in names:
            yield f"{name} (Node)", packages[name]


def test_the_table_has_the_pinned_versions() -> None:
    rows = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    shown = {tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows}
    assert shown == set(pinned()), "run `make clients`"


def test_a_row_tells_what_passed_and_what_did_not() -> None:
    tried = [
        Outcome("b", "2", "chat", "passed"),
        Outcome("a", "1", "chat", "passed"),
        Outcome("b", "2", "tools", "xfailed", "it drops them"),
        Outcome("b", "2", "chat", "passed"),
    ]
    assert list(table(tried))[2:] == [
        "| a | 1 | chat | 1 of 1 |",
        "| b | 2 | chat; not tools: it drops them | 1 of 2 |",
    ]
