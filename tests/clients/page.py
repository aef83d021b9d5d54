"""The table of clients in docs/clients.md, as the suite's outcomes have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"


class Outcome(NamedTuple):
    """Of one test. `outcome`: passed, failed, or xfailed for `reason`, where the client is at fault."""

    client: str
    version: str
    tried: str
    outcome: str
    reason: str = ""


def table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A row per client, by name. What was tried in several ways passes in all of them or fails."""
    by_client: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    for each in outcomes:
        by_client.setdefault((each.client, each.version), {}).setdefault(each.tried, []).append(each)
    yield "| client | version | what was tried | pass |"
    yield "|---|---|---|---|"
    for (client, version), tried in sorted(by_client.items()):
        told, num_passed = [], 0
        for name, ways in tried.items():
            if faults := [each.reason or each.outcome for each in ways if each.outcome != "passed"]:
                told.append(f"not {name}: {faults[0]}")
            else:
                told.insert(num_passed, name)
                num_passed += 1
        yield f"| {client} | {version} | {_listed(told, num_passed)} | {num_passed} of {len(tried)} |"


def _listed(told: Sequence[str], num_passed: int) -> str:
    return "; ".join(filter(None, (", ".join(told[:num_passed]), *told[num_passed:])))


def page_with(outcomes: Sequence[Outcome], page: str) -> str:
    """The page with their table in it."""
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN, *table(outcomes), END]) + rest.partition(END)[2]
