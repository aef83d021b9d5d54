"""`flowkv doctor`: checks of the bus, the cluster and this host, each with what mends what it finds."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """What a check has found. Of what is not `good` the `mend` says what to do."""

    about: str
    level: Literal["good", "look", "bad"]
    said: str
    mend: str = ""


def good(about: str, said: str) -> Finding:
    return Finding(about, "good", said)


def look(about: str, said: str, mend: str = "") -> Finding:
    """It works, but not as well as it could; or it can't be told."""
    return Finding(about, "look", said, mend)


def bad(about: str, said: str, mend: str) -> Finding:
    return Finding(about, "bad", said, mend)
