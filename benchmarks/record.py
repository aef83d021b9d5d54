"""Record what a scheduler hears and decides, until Ctrl-C or for `--seconds`.

Prompts are not in the recording: a scheduler never sees them. Start it before the scheduler to have all that
it knew; `python -m benchmarks replay FILE` decides again.

The recorder listens where schedule requests go. So while it runs and no scheduler is there, a gateway that
asks for a pair learns of that by a timeout (1 s), not at once.

The file has one JSON object per line, in the order of arrival; `t` is seconds since the recording began:

    {"t": 1.25, "subject": "flowkv.v1.load.d0", "message": {"type": "LoadReport", ...}}

Two kinds of lines are no messages: a changed record of the registry (its subject as in JetStream, null when
it is gone), and that the recorder is back on NATS.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from nats.aio.msg import Msg

from benchmarks import BenchmarkFailed
from flowkv.terminal import find_nats
from flowkv_common.aio import running, stop_on_signals
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import NodeDescriptor

NODE_PREFIX = f"$KV.{subjects.NODES_BUCKET}."
RECONNECTED = "reconnected"
SUBJECTS = (
    subjects.LOAD_ALL,
    subjects.BLOCKS_ALL,
    subjects.SCHEDULE,
    subjects.assignment("*"),
    subjects.event("regime_changed", "*"),
    subjects.event("cap_moved", "*"),
    subjects.event("scale_wanted", "*"),
)


class Line(msgspec.Struct, frozen=True):
    """`message` is JSON as it came: its kind shows in the subject."""

    t: float
    subject: str
    message: msgspec.Raw


def read_lines(path: Path) -> Iterator[Line]:
    """All lines in order. Raises BenchmarkFailed, with the line, for what is no recording."""
    if not path.exists():
        raise BenchmarkFailed(f"{path}: no such file")
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                yield msgspec.json.decode(text, type=Line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BenchmarkFailed(f"{path}, line {number}: {error}") from None


def write_line(out: BinaryIO, t: float, subject: str, message: Any) -> None:
    """Append one line. `t` is kept to the microsecond; `message` is anything that JSON can hold."""
    out.write(msgspec.json.encode({"t": round(t, 6), "subject": subject, "message": message}) + b"\n")


class Recorder:
    """Writes all it is given to `out`, with the seconds since it was made.

    `plain_name` is that of the bus: recordings of all namespaces have the same subjects.
    """

    def __init__(self, out: BinaryIO, plain_name: Callable[[str], str] = str) -> None:
        self.num_lines = 0
        self.num_unreadable = 0
        self._out = out
        self._plain_name = plain_name
        self._began = time.monotonic()
        self._nodes: dict[str, NodeDescriptor] = {}

    async def on_message(self, msg: Msg) -> None:
        try:
            self._write(self._plain_name(msg.subject), msgspec.json.decode(msg.data))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.num_unreadable += 1

    def on_nodes(self, nodes: Mapping[str, NodeDescriptor]) -> None:
        """One line for each record that has changed since the last call."""
        for node_id in sorted({*self._nodes, *nodes}):
            if self._nodes.get(node_id) != nodes.get(node_id):
                self._write(NODE_PREFIX + node_id, nodes.get(node_id))
        self._nodes = dict(nodes)

    def on_reconnect(self) -> None:
        self._write(RECONNECTED, None)

    def _write(self, subject: str, message: object) -> None:
        write_line(self._out, time.monotonic() - self._began, subject, message)
        self.num_lines += 1


@contextlib.asynccontextmanager
async def recording(bus: Bus, recorder: Recorder) -> AsyncIterator[None]:
    """Record while the context lasts; what has arrived by its end is recorded."""
    forget_callback = bus.on_reconnect(recorder.on_reconnect)
    async with contextlib.AsyncExitStack() as subscriptions:
        for subject in SUBJECTS:
            await subscriptions.enter_async_context(await bus.subscribe_raw(subject, recorder.on_message))
        async with running(watch_nodes(bus, recorder.on_nodes)):
            yield
    forget_callback()


async def record(options: argparse.Namespace) -> None:
    stop = stop_on_signals()
    with options.out.open("wb") as out:
        async with connect(find_nats(options.nats), name="flowkv-record", on_closed=stop.set) as bus:
            recorder = Recorder(out, bus.plain_name)
            with contextlib.suppress(TimeoutError):
                async with recording(bus, recorder), asyncio.timeout(options.seconds):
                    await stop.wait()
    unreadable = f", {recorder.num_unreadable} messages were no JSON" if recorder.num_unreadable else ""
    print(f"{recorder.num_lines} lines in {options.out}{unreadable}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks record", description=__doc__)
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`make up` prints it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=None, help="until Ctrl-C if not given")
    asyncio.run(record(parser.parse_args(argv)))
    return 0
