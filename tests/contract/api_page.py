"""Writes the tables of docs/api.md from the code: run this file after a change to either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flowkv_gateway.schemas import (
    CHANGE_NOTHING,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def page_from_code(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, lines in (("served", _served()), ("refused", _refused()), ("nothing", _nothing())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        assert begin in page, f"docs/api.md has no {begin}"
        table = "\n".join([begin, *lines, end])
        before, _, rest = page.partition(begin)
        page = before + table + rest.partition(end)[2]
    return page


def _served() -> Iterator[str]:
    common = GenerationRequest.__struct_fields__
    yield f"- both generation endpoints: {_names(common)}"
    for path, kind in (
        ("/v1/chat/completions", ChatRequest),
        ("/v1/completions", CompletionRequest),
        ("/tokenize", TokenizeRequest),
    ):
        own = [name for name in kind.__struct_fields__ if kind is TokenizeRequest or name not in common]
        yield f"- `{path}`: {_names(own)}"


def _refused() -> Iterator[str]:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in REFUSED:
        accepted = ", ".join(f"`{json.dumps(value)}`" for value in row.accepted if value is not None)
        alike.setdefault((", ".join(row.endpoints), accepted, row.reason), []).append(row.name)
    for (where, accepted, reason), names in alike.items():
        but = f"; not {accepted}" if accepted else ""
        yield f"- {_names(names)} ({where}{but}): {reason}"


def _nothing() -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for name, reason in CHANGE_NOTHING.items():
        reason = list(alike)[-1] if reason == "the same" else reason
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        yield f"- {_names(names)}: {reason}"


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page_from_code(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
