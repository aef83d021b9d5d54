"""What the documentation points at in the code exists, and comments point at rules that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]
CODE = [*sorted((ROOT / "libs").iterdir()), *sorted((ROOT / "services").iterdir()), ROOT]
REFERENCE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([\w./-]+\.md)?(?:#([\w-]+))?\)")


def is_defined(name: str, body: list[ast.stmt]) -> bool:
    """Whether `Class.method`, a function, a class or a constant is defined in `body`."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == first:
            return not rest or (isinstance(node, ast.ClassDef) and is_defined(rest, node.body))
        if isinstance(node, ast.Assign) and not rest:
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if first in names:
                return True
    return False


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("doc", DOCS)
def test_files_and_names_in_the_code_exist(doc: str) -> None:
    for path, name in REFERENCE.findall((ROOT / doc).read_text()):
        found = [folder / path for folder in CODE if (folder / path).is_file()]
        assert found or "/" not in path, f"{doc} names {path}, which is not there"
        if name:
            assert is_defined(name, ast.parse(found[0].read_text()).body), f"{doc} names {path}:{name}"


def test_the_pages_name_files_in_the_form_that_is_checked() -> None:
    assert len(REFERENCE.findall((ROOT / "docs/architecture.md").read_text())) > 10


def test_documented_benchmarks_exist() -> None:
    pages = "\n".join((ROOT / doc).read_text() for doc in DOCS)
    known = {name for group in BENCHMARKS.values() for name in group}
    named = set(re.findall(r"python -m benchmarks ([a-z-]+)", pages))
    assert named
    assert named <= known


@pytest.mark.parametrize("doc", ["docs/performance.md", "docs/simulator.md"])
def test_results_behind_figures_exist(doc: str) -> None:
    named = re.findall(r"`([a-z0-9*-]+\.json)`", (ROOT / doc).read_text())
    assert named
    for pattern in named:
        assert any((ROOT / "benchmarks/results").glob(pattern)), f"{doc} names {pattern}"


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc: str) -> None:
    for path, anchor in LINK.findall((ROOT / doc).read_text()):
        target = (ROOT / doc).parent / path if path else ROOT / doc
        assert target.is_file(), f"{doc} links to {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{doc} links to {path}#{anchor}"


def test_comments_name_rules_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rules = re.search(r"^## What always holds\n(.*?)^### ", text, re.M | re.S)
    assert rules is not None
    numbers = set(re.findall(r"^(\d+)\. ", rules[1], re.M))
    for folder in ("libs", "services", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            named = set(re.findall(r"docs/architecture\.md, rule (\d+)", file.read_text()))
            assert named <= numbers, file
