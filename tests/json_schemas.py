"""Two hundred JSON schemas over the keywords that answers can be held to, and what checks an answer."""

from __future__ import annotations

import json
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
]


def _as_property(schema: Schema) -> Schema:
    return _object(before={"type": "boolean"}, it=schema, after={"enum": [0, 1]})


def _as_items(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}


def _as_reference(schema: Schema) -> Schema:
    return {**_object(first={"$ref": "#/$defs/it"}), "$defs": {"it": schema}}


SCHEMAS: list[Schema] = [
    *FEATURES,
    *map(_as_property, FEATURES),
    *map(_as_items, FEATURES),
    *map(_as_reference, FEATURES),
    _TREE,
    {**_object("next", value={"const": 1}, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]})},
    _object(**{f"p{place}": {"type": "boolean"} for place in range(20)}),
    {"enum": [f"word-{place}" for place in range(500)]},
]


def check(schema: Schema, text: str) -> None:
    """Raises AssertionError if `text` is not JSON of this schema."""
    kind = jsonschema.Draft202012Validator
    try:
        value = json.loads(text.replace('"0000-', '"0004-'))  # Python's dates begin with year 1
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"{text!r} is not of {json.dumps(schema)}: {error}") from error
