"""Over 250 JSON schemas of the keywords that answers can be held to, and what checks an answer."""

from __future__ import annotations

import json
import re
from datetime import datetime, time
from typing import Any

import jsonschema

Schema = dict[str, Any]


def _object(*optional: str, **properties: Any) -> Schema:
    """Closed, as OpenAI's strict mode wants it; all are required but the `optional` ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_TREE: Schema = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": _object(
            "children",
            value={"type": "integer", "minimum": 0, "maximum": 9},
            children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        )
    },
}
_SHAPES: Schema = {
    "anyOf": [
        _object(kind={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
        _object(kind={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 10}),
    ]
}

# One keyword or two each, none with a `$ref` out of itself.
FEATURES: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "string", "maxLength": 8},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": ["integer", "boolean", "null"]},
    {"const": {"a": [1, "two", None]}},
    {"const": 'quo"te\\'},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, "three", None, True, {"four": 4}]},
    {"enum": ["é", "日本", "😀"]},
    {"enum": ["<|im_end|>", "a<|im_start|>b", "<|end|>", "<tool_call>"]},
    {"type": "integer", "minimum": 3, "maximum": 17},
    {"type": "integer", "minimum": -25, "maximum": -3},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 1.5},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "pattern": "^(foo|bar)-[0-9]{1,3}$"},
    {"type": "string", "pattern": "[A-Z]", "maxLength": 6},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "duration"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "hostname"},
    {"type": "string", "format": "uri"},
    {"type": "string", "format": "date", "pattern": "^[12]"},
    {"type": "string", "pattern": "^\\d{2}\\s\\w$"},
    {"type": "string", "pattern": "^é+$", "minLength": 2, "maxLength": 3},
    {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 3},
    {"type": "integer", "minimum": -2.5, "maximum": 7.5},
    {"type": "integer", "minimum": 0, "maximum": 2**53 - 1},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": False},
    {
        "type": "array",
        "prefixItems": [{"type": "integer", "maximum": 9, "minimum": 0}, {"enum": ["x", "y"]}],
        "items": False,
        "minItems": 2,
    },
    {
        "type": "array",
        "prefixItems": [{"const": "head"}],
        "items": {"type": "boolean"},
        "minItems": 1,
        "maxItems": 3,
    },
    _object(name={"type": "string", "maxLength": 6}, age={"type": "integer", "minimum": 0, "maximum": 130}),
    _object("nick", id={"type": "integer", "minimum": 0, "maximum": 999}, nick={"enum": ["a", "b"]}),
    _object("a", "b", "c", a={"const": 1}, b={"const": 2}, c={"const": 3}),
    _object(**{"a key": {"type": "boolean"}, 'quo"ted': {"type": "null"}, "ключ": {"const": 0}}),
    _object(outer=_object(inner=_object(leaf={"enum": ["deep"]}))),
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "additionalProperties": {"enum": [1, 2]},
        "maxProperties": 3,
        "required": ["a"],
    },
    {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"], "maxProperties": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    {"oneOf": [{"type": "null"}, {"enum": ["only"]}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 6}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]},
        ],
        "maxProperties": 2,
    },
    _SHAPES,
    {"type": "string", "maxLength": 3, "title": "annotated", "description": "no more", "default": "x"},
    {"type": "array", "items": _object(k={"enum": ["p", "q"]}), "minItems": 1, "maxItems": 2},
    {"anyOf": [{"type": "array", "items": {"const": 0}, "maxItems": 2}, {"const": {}}, {"const": "none"}]},
    {
        "oneOf": [
            _object(type={"const": "text"}, text={"type": "string", "maxLength": 5}),
            _object(type={"const": "image"}, width={"enum": [1, 2]}, height={"enum": [1, 2]}),
        ],
        "discriminator": {"propertyName": "type"},
    },
    _object(note={"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}], "default": None}),
    {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}},
    {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "required": ["a", "b"],
        "additionalProperties": {"type": "array", "items": {"type": "boolean"}, "maxItems": 1},
        "maxProperties": 3,
    },
]


def _as_property(schema: Schema) -> Schema:
    return _object(before={"type": "boolean"}, it=schema, after={"enum": [0, 1]})


def _as_items(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}


def _as_reference(schema: Schema) -> Schema:
    return {**_object(first={"$ref": "#/$defs/it"}), "$defs": {"it": schema}}


_PERSON = _object(
    "email",
    name={"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
    born={"type": "string", "format": "date"},
    email={"type": "string", "format": "email", "maxLength": 20},
)
# These refer to themselves, or to a place that moves when they are put into another.
_REFERRING: list[Schema] = [
    _TREE,
    {**_object("next", value={"const": 1}, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]})},
    {**_object(a={"type": "boolean"}, b={"$ref": "#/properties/a"})},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": ["slash"]}}},
    {"$ref": "#/definitions/it", "definitions": {"it": {"type": "null"}}},
    {"$ref": "#it", "$defs": {"any": {"$anchor": "it", "type": "boolean"}}},
    {"$ref": "#/$defs/it", "maximum": 5, "$defs": {"it": {"type": "integer", "minimum": 0}}},
    {
        "$ref": "#/$defs/ping",
        "$defs": {
            "ping": _object(ping={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pong"}]}),
            "pong": _object(pong={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/ping"}]}),
        },
    },
    {
        "allOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}],
        "maxProperties": 2,
        "$defs": {
            "x": {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]},
            "y": {"type": "object", "properties": {"y": {"const": 2}}, "required": ["y"]},
        },
    },
    {
        **_object(
            "lines",
            number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
            customer={"$ref": "#/$defs/person"},
            paid_at={"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
            lines={"type": "array", "items": {"$ref": "#/$defs/line"}, "maxItems": 2},
            total={"type": "number", "minimum": 0, "maximum": 100_000},
        ),
        "$defs": {
            "person": _PERSON,
            "line": _object(
                what={"enum": ["tea", "кофе", "🍰"]}, amount={"type": "integer", "minimum": 1, "maximum": 99}
            ),
        },
    },
]

SCHEMAS: list[Schema] = [
    *FEATURES,
    *map(_as_property, FEATURES),
    *map(_as_items, FEATURES),
    *map(_as_reference, FEATURES),
    *_REFERRING,
    _object(**{f"p{place}": {"type": "boolean"} for place in range(20)}),
    {"enum": [f"word-{place}" for place in range(500)]},
]


_KIND = jsonschema.Draft202012Validator
_FORMATS = _KIND.FORMAT_CHECKER


def _is_of(name: str, text: str) -> bool:
    """Of a format that `jsonschema` knows only with further packages. Raises ValueError, too."""
    if name == "date-time":
        return datetime.fromisoformat(text).tzinfo is not None
    if name == "time":
        return time.fromisoformat(text).tzinfo is not None
    label = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
    pattern = {
        "duration": r"P(?=.)(\d+W|(\d+[YMD])*(T(\d+[HMS])+)?)",
        "hostname": rf"{label}(\.{label})*",
        "uri": r"[A-Za-z][A-Za-z0-9+.-]*:\S*",
    }[name]
    return re.fullmatch(pattern, text) is not None


for _name in ("date-time", "time", "duration", "hostname", "uri"):
    _FORMATS.checks(_name, ValueError)(
        lambda value, name=_name: not isinstance(value, str) or _is_of(name, value)
    )


def check(schema: Schema, text: str) -> None:
    """Raises AssertionError if `text` is not JSON of this schema."""
    try:
        _KIND(schema, format_checker=_FORMATS).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"{text!r} is not of {json.dumps(schema)}: {error}") from error
