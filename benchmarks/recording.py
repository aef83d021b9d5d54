"""What a scheduler hears and says, as a file: one JSON object per line, in the order of arrival.

    {"t": 1.25, "subject": "flowkv.v1.load.d0", "message": {"type": "LoadReport", ...}}

`t` is seconds since the recording began. Two kinds of lines are no messages: a record of the registry that
has changed (its subject as in JetStream, null when it is gone), and that the recorder is back on NATS.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from flowkv_common.wire.subjects import NODES_BUCKET

NODE_PREFIX = f"$KV.{NODES_BUCKET}."
RECONNECTED = "reconnected"


class Line(msgspec.Struct, frozen=True):
    """`message` is JSON as it came: whoever reads it knows the kind by the subject."""

    t: float
    subject: str
    message: msgspec.Raw


class UnreadableRecording(Exception):
    """Not a recording; the message says in which line."""


def write_line(out: BinaryIO, t: float, subject: str, message: Any) -> None:
    """Append one line. `t` is kept to the microsecond; `message` is anything that JSON can hold."""
    out.write(msgspec.json.encode({"t": round(t, 6), "subject": subject, "message": message}) + b"\n")


def read_lines(path: Path) -> Iterator[Line]:
    """All lines in order. Raises `UnreadableRecording`, OSError."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                yield msgspec.json.decode(text, type=Line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UnreadableRecording(f"{path}, line {number}: {error}") from None
