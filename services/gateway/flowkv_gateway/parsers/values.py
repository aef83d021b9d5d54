"""Values as models write them: JSON, Python's literals, plain text whose type a schema tells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# JSON's types, by their names in schemas. bool is an int in Python, so it comes first where it matters.
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
MAX_DEPTH = 100  # of brackets; far more than calls have, far less than Python's stack


def json_text(value: object) -> str | None:
    """As JSON; None if its brackets are too deep, or its numbers too long, for a reader."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only escape
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return text


def from_json(text: str) -> Any:
    """The value of this JSON text; line breaks in strings are allowed, models write them.

    Raises ValueError if it is no JSON.
    """
    try:
        return json.loads(text, strict=False, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("too deep") from None


def or_none(text: str) -> Any:
    """The same, but None for what is no JSON."""
    try:
        return from_json(text)
    except ValueError:
        return None


def from_text(text: str, schema: object) -> Any:
    """A parameter that was written without quotes: JSON if its schema allows other types than strings.

    Text that is nothing that the schema allows stays text: whoever runs the call tells the model.
    """
    types = set(types_of(schema))
    if types == {"string"}:
        return text
    for read in (from_json, _from_python) if types else (from_json,):
        try:
            value = read(text.strip())
        except ValueError:
            continue
        if not types or any(_has_type(value, type_) for type_ in types):
            return value
    return text


def _from_python(text: str) -> Any:
    return Literals(text).whole()


def types_of(schema: object) -> Iterator[str]:
    """The names of all types that the schema allows; none if it doesn't say."""
    if not isinstance(schema, Mapping):
        return
    named = schema.get("type")
    yield from [named] if isinstance(named, str) else named if isinstance(named, list) else []
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or ():
            yield from types_of(part)
    if named is None:
        for value in schema.get("enum") or ([schema["const"]] if "const" in schema else []):
            yield next(type_ for type_ in _TYPES if _has_type(value, type_))


def _has_type(value: object, type_: str) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    if type_ == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(type_, ()))


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"JSON can't have {number}")
    return value


class Literals:
    """Reads Python's literals and calls. All methods raise ValueError where the text is something else."""

    _TOKEN = re.compile(
        r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<word>[^\W\d][\w.\-]*)|(?P<number>[-+]?[\d.][\w.+-]*)|(?P<mark>[()\[\]{}:,=])|(?P<end>\Z))""",
        re.DOTALL,
    )
    _ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
    _ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
    _CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._depth = 0
        self._advance()

    def whole(self) -> Any:
        """All the text as one value."""
        value = self.value()
        self._expect("")
        return value

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """All the text as a list of calls: `[f(a=1), g()]`."""
        self._expect("[")
        calls = list(self._items("]", self._call))
        self._expect("")
        return calls

    def value(self) -> Any:
        kind, token = self._kind, self._token
        if kind not in ("string", "number", "word") and token not in ("[", "(", "{"):
            raise ValueError(f"{token!r} is no value")
        self._advance()
        if kind == "string":
            return self._ESCAPE.sub(self._unescape, token[1:-1])
        if kind == "number":
            return from_json(token.lstrip("+").replace("_", ""))
        if kind == "word":
            if token not in self._CONSTANTS:
                raise ValueError(f"{token} is no value")
            return self._CONSTANTS[token]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("too deep")
        value = (
            dict(self._items("}", self._member))
            if token == "{"
            else list(self._items({"[": "]", "(": ")"}[token], self.value))
        )
        self._depth -= 1
        return value

    def _call(self) -> tuple[str, dict[str, Any]]:
        name = self._name()
        self._expect("(")
        return name, dict(self._items(")", self._keyword))

    def _keyword(self) -> tuple[str, Any]:
        name = self._name()
        self._expect("=")
        return name, self.value()

    def _member(self) -> tuple[str, Any]:
        key = self.value()
        self._expect(":")
        return key if isinstance(key, str) else json.dumps(key), self.value()

    def _items(self, closing: str, read: Any) -> Iterator[Any]:
        while self._token != closing or self._kind != "mark":
            yield read()
            if self._token != closing:
                self._expect(",")
        self._advance()

    def _name(self) -> str:
        if self._kind != "word":
            raise ValueError(f"{self._token!r} is no name")
        name = self._token
        self._advance()
        return name

    def _expect(self, mark: str) -> None:
        if self._kind not in ("mark", "end") or self._token != mark:
            raise ValueError(f"{self._token!r} where {mark!r} must be")
        if mark:
            self._advance()

    def _advance(self) -> None:
        found = self._TOKEN.match(self._text, self._place)
        if found is None:
            raise ValueError(f"no Python at {self._place}")
        self._place = found.end()
        self._kind = found.lastgroup
        self._token = found.group(self._kind or 0)

    def _unescape(self, found: re.Match[str]) -> str:
        code = found[1] or found[2]
        if code:
            return chr(int(code, 16))
        return self._ESCAPED.get(found[3], found[3] if found[3] in "\\'\"" else found[0])
