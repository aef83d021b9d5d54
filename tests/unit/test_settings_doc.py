"""docs/operations.md lists every setting of the gateway with its default."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from flowkv_common.config import GatewaySettings

PAGE = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
SECTION = PAGE.split("## Settings of the gateway", 1)[1].split("\n## ", 1)[0]


def test_every_setting_is_listed_and_no_other() -> None:
    listed = set(re.findall(r"FLOWKV_(\w+)", SECTION))
    assert listed == {name.upper() for name in GatewaySettings.__struct_fields__}


def test_defaults_are_the_code_s() -> None:
    rows = dict(re.findall(r"^\| `FLOWKV_(\w+)` \| `?(\d+)\b", SECTION, re.MULTILINE))
    fields = {field.name.upper(): field.default for field in msgspec.structs.fields(GatewaySettings)}
    assert len(rows) >= 7
    assert {name: float(told) for name, told in rows.items()} == {name: float(fields[name]) for name in rows}
