"""Writes docs/settings.md from the settings' structs: run this file after a change to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowkv_common.config import (
    OTHER_VARIABLES,
    GatewaySettings,
    NodeSettings,
    SchedulerSettings,
    ServiceSettings,
    Setting,
    settings_of,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"

INTRODUCTION = """\
# Which setting bounds what?

Each setting is a variable, `FLOWKV_PORT`, and a flag, `--port`. Flags win. An unknown one is refused.
`flowkv gateway --help` and the other services' print the same text. What Compose itself reads is in
[compose.md](compose.md).
<!-- written by tests/contract/settings_page.py from flowkv_common/config.py -->
"""

FIXED = """
## Bounds that are not settings

Of a request:

- it has three attempts, and waits for 20 s where no scheduler answers, for 10 s where no node is ready
- a stream has its headers after 1 s
- an attempt fails after 3 s without token or keepalive, and 2 s without an answer to `Resume`
- `priority` counts from -6 to 6

Of a client that reads slowly:

- of its stream 64 KiB and one event lie unsent in the gateway, and 64 KiB in the kernel
- its tokens wait in the gateway, at most the rest of its answer: 0.5 KB per token, 3 KB with 20 log
  probabilities
- a stream is cut off when its buffer is full and loses less than 48 KiB in `FLOWKV_SEND_TIMEOUT_S`; a whole
  answer, which is written at once, when the client takes nothing for 60 s

Of a node:

- it gets no new work after three load reports are missing, and leaves the registry after 6 s
- a handoff waits for a link for 5 s
- a reservation ends 30 s after its last renewal; a prompt that gets no blocks gives it back, if its own node
  has reservations of others: after 1 s at first, after 12 s at most
- a transfer ends after 10 s of silence; a handoff after three minutes without progress, and the time of its
  bytes at 10 MB/s
- output can be asked for again for 30 s after its end
- tombstones: an hour, 100,000 of them
- an endpoint holds 1,024 requests"""


def page_from_code() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    for title, kind in (
        ("All services", ServiceSettings),
        ("Gateway", GatewaySettings),
        ("Scheduler", SchedulerSettings),
        ("Nodes: prefill, decode, mixed", NodeSettings),
    ):
        yield f"## {title}\n"
        common = () if kind is ServiceSettings else ServiceSettings.__struct_fields__
        yield from (_row(setting) for setting in settings_of(kind) if setting.name not in common)
        yield ""
    yield "## Others\n"
    yield from (f"- `{name}`: {text}" for name, text in OTHER_VARIABLES.items())
    yield FIXED


def _row(setting: Setting) -> str:
    if setting.default is None:
        default = " (required)"
    else:
        default = f" (`{setting.default}` {setting.unit}".rstrip() + ")" if setting.default else ""
    choices = f" ({', '.join(f'`{choice}`' for choice in setting.choices)})" if setting.choices else ""
    return f"- `{setting.variable}`{default}: {setting.text}{choices}"


if __name__ == "__main__":
    PAGE.write_text(page_from_code(), encoding="utf-8")
