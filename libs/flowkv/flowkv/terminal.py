"""What all commands share that look at a cluster: how they find NATS, and how they write."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flowkv.local_cluster import NATS_URL_FILE
from flowkv_common.config import NatsSettings, load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from flowkv_common.bus.connection import Bus

# A person waits: services have 30 s to meet their server.
CONNECT_TIMEOUT_S = 3.0
# Of output into a file or a pipe: rich takes 80 columns there and would cut tables.
PIPE_WIDTH = 160


def make_parser(command: str, doc: str, *, needs_nats: bool = True) -> argparse.ArgumentParser:
    """`doc` is the command's module docstring: its first line, then what it teaches."""
    parser = argparse.ArgumentParser(
        prog=f"flowkv {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if needs_nats:
        text = "NATS; else FLOWKV_NATS_URL_FILE, FLOWKV_NATS_URL, the `flowkv up` of this folder, port 4222"
        parser.add_argument("--nats", metavar="URL", help=text)
    return parser


def find_nats(given: str | None) -> NatsSettings:
    """How to reach NATS at the URL that was given, or where the environment or this folder says."""
    flags = ["--nats-url", given] if given else []
    if not given and not any(os.environ.get(f"FLOWKV_NATS_{name}") for name in ("URL", "URL_FILE")):
        local = sorted(Path(".run").glob(f"*/{NATS_URL_FILE}"), key=lambda path: path.stat().st_mtime)
        flags = ["--nats-url-file", str(local[-1])] if local else []
    return load_settings(NatsSettings, flags)


@asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[Bus]:
    """The bus that the options name. Raises CannotStart and Unavailable, when no NATS answers within 3 s."""
    from flowkv_common.bus.connection import connect

    found = find_nats(options.nats)
    name, user = "flowkv-command", "operator"
    async with connect(found, name=name, user=user, connect_timeout_s=CONNECT_TIMEOUT_S) as bus:
        yield bus


@cache
def console() -> Console:
    """For what a command is asked for. In a pipe it writes no colours."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def write_json(value: object) -> None:
    """Indented, on stdout."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def bar(parts: Sequence[tuple[float, str]], width: int) -> str:
    """Shares of a whole as a bar of blocks in rich's markup; what is left over is dim."""
    drawn = ""
    left = width
    for share, colour in parts:
        cells = min(left, round(share * width) or (share > 0))
        drawn += f"[{colour}]{'█' * cells}[/]" if cells else ""
        left -= cells
    return f"{drawn}[dim]{'░' * left}[/]"
