"""Dates and times in JSON schemas, as patterns of what a client can read.

In the formats `date`, `time` and `date-time` the compiler of grammars takes every year for a leap year, and
a second of 60 for a leap second, and it allows `t` and `z`. Clients' libraries refuse some or all of that.
"""

from __future__ import annotations

from typing import Any

_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = (
    "([0-9]{2}(0[48]|[2468][048]|[13579][26])"  # not of a century's end
    "|(0[48]|[2468][048]|[13579][26])00)"
)
_DAY = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR, _MINUTE = "([01][0-9]|2[0-3])", "[0-5][0-9]"
# Longer fractions are read by nobody, and a model may never stop to write them.
_TIME = f"{_HOUR}:{_MINUTE}:{_MINUTE}([.][0-9]{{1,9}})?(Z|[+-]{_HOUR}:{_MINUTE})"
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

# The keywords with schemas in them: by name, in a list, or one.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_OTHERS = ("items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf")


def with_exact_dates(schema: Any) -> Any:
    """The same schema, or list of schemas, with patterns for these formats. Raises RecursionError."""
    if isinstance(schema, list):
        return [with_exact_dates(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    exact = dict(schema)
    for key in schema.keys() & {*_NAMED, *_OTHERS}:
        if key in _OTHERS:
            exact[key] = with_exact_dates(schema[key])
        elif isinstance(named := schema[key], dict):
            exact[key] = {name: with_exact_dates(one) for name, one in named.items()}
    wanted, parts = schema.get("format"), exact.get("allOf", [])
    if isinstance(wanted, str) and wanted in PATTERNS and isinstance(parts, list):
        del exact["format"]
        # Beside a pattern that is there. References into the list still find what they did.
        exact["allOf"] = [*parts, {"pattern": PATTERNS[wanted]}]
    return exact
