"""Writes what the chart says twice: its README.md from the comments in values.yaml, files/accounts.json from
the rights of NATS users. Run this file, `python -m tests.deploy.chart_files`, after a change to either."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from flowkv.accounts import write_accounts

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "flowkv"
README = CHART / "README.md"
ACCOUNTS = CHART / "files" / "accounts.json"
VALUES = CHART / "values.yaml"
# The values of another chart: its own page describes them.
SUBCHART = "nats"

INTRODUCTION = """\
# The chart `flowkv`

[docs/kubernetes.md](../../../docs/kubernetes.md) tells how to install it, and what has run.
<!-- written by tests/deploy/chart_files.py from values.yaml -->
"""


def accounts_from_code() -> str:
    """The NATS users without their passwords."""
    with tempfile.TemporaryDirectory() as folder:
        write_accounts(Path(folder), "nats:4222")
        config = json.loads((Path(folder) / "nats" / "nats.conf").read_text())
    users = config["authorization"]["users"]
    return json.dumps([{k: v for k, v in user.items() if k != "password"} for user in users], indent=2) + "\n"


def page_from_values() -> str:
    return "\n".join(_lines(VALUES.read_text(encoding="utf-8"))) + "\n"


def undocumented(text: str) -> list[str]:
    """Values without a comment of their own or above them, those of the subchart apart."""
    return [path for path, comment, _ in _values(text) if not comment and not path.startswith(f"{SUBCHART}.")]


def _lines(text: str) -> Iterator[str]:
    yield INTRODUCTION
    for section in text.split("\n# ## ")[1:]:
        title, *lines = section.splitlines()
        words = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        body = "\n".join(lines[len(words) :])
        yield f"## {title}\n"
        if said := "\n".join(line.removeprefix("#").strip() for line in words).strip():
            yield f"{said}\n"
        yield "| value | default | meaning |"
        yield "|---|---|---|"
        for path, comment, default in _values(body):
            if comment:
                shown = json.dumps(default).replace("|", "\\|")
                yield f"| `{path}` | `{shown}` | {comment.replace('|', chr(92) + '|')} |"
        yield ""


def _values(text: str) -> Iterator[tuple[str, str, object]]:
    """Path, comment and default of values: down to those that have a comment, or no parts."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, above: str) -> Iterator[tuple[str, str, object]]:
        for key, value in node.value:
            path = f"{above}{key.value}"
            comment = _comment_above(lines, key.start_mark.line, key.start_mark.column)
            is_map = isinstance(value, yaml.MappingNode) and value.value
            if comment or not is_map:
                yield path, comment, yaml.safe_load(yaml.serialize(value))
            else:
                yield from walk(value, f"{path}.")

    root = yaml.compose(text)
    if root is not None:
        yield from walk(root, "")


def _comment_above(lines: list[str], line: int, column: int) -> str:
    found: list[str] = []
    for above in reversed(lines[:line]):
        if not above.startswith(" " * column + "# "):
            break
        found.insert(0, above.strip().removeprefix("# "))
    return " ".join(found)


if __name__ == "__main__":
    ACCOUNTS.write_text(accounts_from_code(), encoding="utf-8")
    README.write_text(page_from_values(), encoding="utf-8")
