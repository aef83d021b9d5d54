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
from flowkv_common.config import SchedulerSettings
from flowkv_common.errors import CannotStart

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


def find_nats_url(given: str | None) -> str:
    """Raises CannotStart if the file that should hold it can't be read."""
    if given:
        return given
    if path := os.environ.get("FLOWKV_NATS_URL_FILE"):
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise CannotStart(f"FLOWKV_NATS_URL_FILE: {error}") from None
    if url := os.environ.get("FLOWKV_NATS_URL"):
        return url
    local = sorted(Path(".run").glob(f"*/{NATS_URL_FILE}"), key=lambda path: path.stat().st_mtime)
    return local[-1].read_text().strip() if local else SchedulerSettings().nats_url


@asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[Bus]:
    """The bus that the options name. Raises Unavailable when no NATS answers within 3 s."""
    from flowkv_common.bus.connection import connect

    url = find_nats_url(options.nats)
    async with connect(url, name="flowkv-command", connect_timeout_s=CONNECT_TIMEOUT_S) as bus:
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
