"""docs/protocol.md says what the code says: all of it, and nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ForwardRef, NamedTuple

import msgspec
import pytest

from flowkv_common import errors
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import LayerKV, Message, Run
from tests.contract.wire_examples import MESSAGES, PARTS

ROOT = Path(__file__).resolve().parents[2]
SECTIONS: dict[str, str] = dict(
    re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/protocol.md").read_text(), re.M | re.S)
)
TUPLES: list[type] = [Run, LayerKV]
MESSAGE_NAMES = {kind.__name__ for kind in MESSAGES}

Row = dict[str, str]


def rows(text: str) -> Iterator[Row]:
    """Every row of every table in `text`, as heading -> cell."""
    headings: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            headings = None
            continue
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if headings is None:
            headings = cells
        elif not set("".join(cells)) <= set("- "):
            yield dict(zip(headings, cells, strict=True))


def named(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]*)`", cell)


def only_named(cell: str) -> str:
    [name] = named(cell)
    return name


def names_in_code() -> set[str]:
    """Constants and functions of `wire/subjects.py` but for those that only change others of them."""
    changes = ("at", "in_namespace", "service_in_namespace", "DEFAULT_NAMESPACE")
    return {
        name
        for name, value in vars(subjects).items()
        if not name.startswith("_")
        and name not in ("annotations", *changes)
        and (callable(value) or name.isupper())
    }


def spelled(name: str) -> set[str]:
    """How the documentation may write what `name` stands for, ids in angle brackets."""
    value = getattr(subjects, name)
    if callable(value):
        return {value(*(f"<{parameter}>" for parameter in inspect.signature(value).parameters))}
    return {value, subjects.at(value, "<node_id>")}


def test_every_name_is_documented_as_it_is() -> None:
    documented = {}
    for section, heading in [("Subjects", "subject"), ("Buckets", "bucket"), ("Headers", "header")]:
        for row in rows(SECTIONS[section]):
            if "name" in row:
                documented[only_named(row["name"])] = only_named(row[heading])
    assert documented.keys() == names_in_code()
    assert {name: text for name, text in documented.items() if text not in spelled(name)} == {}


def test_every_message_has_its_place_and_no_other_is_named() -> None:
    placed = {"Refusal"}  # the body of any answer that is an error
    for section in ("Subjects", "Buckets"):
        for row in rows(SECTIONS[section]):
            placed.update(named(row["message"]))
            placed.update(named(row.get("reply", "")))
    assert placed == MESSAGE_NAMES


def test_the_events_are_those_that_services_publish() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "services").rglob("flowkv_*/*.py"))
    published = set(re.findall(r'subjects\.event\(\s*"(\w+)"', sources))
    pattern = re.compile(re.escape(subjects.event("NAME", "")).replace("NAME", r"(\w+)") + "<")
    table = [row for row in rows(SECTIONS["Subjects"]) if "published by" in row]
    found = [pattern.match(only_named(row["subject"])) for row in table]
    assert {match[1] for match in found if match} == published
    assert len(table) == len(published)


class FieldsLine(NamedTuple):
    """A line of a struct's list: one field or several, and what they mean (maybe nothing)."""

    fields: list[str]
    meaning: str


def described(section: str) -> dict[str, list[FieldsLine]]:
    """Heading -> the lines of its list."""
    found = re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", SECTIONS[section], re.M | re.S)
    assert len(found) == len(dict(found)), "a struct is described twice"
    return {
        name: [
            FieldsLine(named(fields), meaning)
            for fields, meaning in re.findall(r"^- ((?:`[^`]+`(?:, )?)+)(?:: (.+))?$", text, re.M)
        ]
        for name, text in found
    }


def declared(cell: str) -> tuple[str, str, str]:
    """Field, type and default of `name: type = default`; the default is empty where there is none."""
    name, _, rest = cell.partition(": ")
    type_, _, default = rest.partition(" = ")
    return name, type_, default


def common_fields() -> set[str]:
    """Fields that a table of their own explains for all messages."""
    return {
        name
        for row in rows(SECTIONS["Messages"])
        for name in named(row.get("common field", ""))
        if row["meaning"]
    }


def in_code(kind: Any) -> list[tuple[str, str, str]]:
    """Field, type as it stands in the source, default as JSON (empty: required)."""
    if kind in TUPLES:
        types = {field: _source(kind.__annotations__[field]) for field in kind._fields}
        return [
            (field, written, str(kind._field_defaults.get(field, ""))) for field, written in types.items()
        ]
    return [
        (field.encode_name, _source(kind.__annotations__[field.name]), _default(field))
        for field in msgspec.structs.fields(kind)
    ]


def _source(annotation: str | ForwardRef) -> str:
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.json.encode(field.default_factory()).decode()
    return "" if field.required else msgspec.json.encode(field.default).decode()


@pytest.mark.parametrize(("section", "kinds"), [("Messages", MESSAGES), ("Parts", [*PARTS, *TUPLES])])
def test_every_struct_is_described_and_no_other(section: str, kinds: list[type]) -> None:
    assert described(section).keys() == {kind.__name__ for kind in kinds}


@pytest.mark.parametrize("kind", [*MESSAGES, *PARTS, *TUPLES], ids=lambda kind: kind.__name__)
def test_fields_types_and_defaults_are_those_of_the_code(kind: type) -> None:
    lines = described("Messages" if issubclass(kind, Message) else "Parts")[kind.__name__]
    documented = [declared(field) for line in lines for field in line.fields]
    assert documented == in_code(kind)
    unexplained = {declared(field)[0] for line in lines if not line.meaning for field in line.fields}
    assert unexplained <= common_fields()


def test_every_error_code_is_documented_and_no_other() -> None:
    kinds = [kind for kind in errors.FlowKVError.__subclasses__() if kind.__module__ == errors.__name__]
    documented = [(int(row["code"]), only_named(row["class"])) for row in rows(SECTIONS["Errors"])]
    assert sorted(documented) == sorted((kind.code, kind.__name__) for kind in kinds)
