"""docs/api.md tells of the fields what the code does with them."""

from __future__ import annotations

from tests.contract.api_page import PAGE, page_from_code


def test_the_page_agrees_with_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_from_code(page), "run tests/contract/api_page.py"
