"""docs/settings.md tells of every setting what the code does with it, and no page or help tells otherwise."""

from __future__ import annotations

import re

import msgspec

from flowkv_common.config import KINDS
from tests.contract.settings_page import PAGE, page_from_code

ROOT = PAGE.parents[1]
TOLD = re.compile(r"(FLOWKV_[A-Z_]+)=([\w./:-]*\w)")


def test_the_page_agrees_with_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_from_code(), "run tests/contract/settings_page.py"


def test_values_that_are_told_of_are_valid() -> None:
    types = {
        f"FLOWKV_{field.name.upper()}": field.type for kind in KINDS for field in msgspec.structs.fields(kind)
    }
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*")]
    code = [path for folder in ("libs", "services") for path in (ROOT / folder).rglob("*.py")]
    told = {
        found
        for path in (*pages, *code)
        if path.is_file()
        for found in TOLD.findall(path.read_text(encoding="utf-8"))
    }
    assert ("FLOWKV_LENDING", "false") in told
    for name, value in sorted(told):
        if name in types:
            msgspec.convert(value, types[name], strict=False)
