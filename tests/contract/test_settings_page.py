"""docs/settings.md tells of every setting what the code does with it."""

from __future__ import annotations

from tests.contract.settings_page import PAGE, page_from_code


def test_the_page_agrees_with_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_from_code(), "run tests/contract/settings_page.py"
