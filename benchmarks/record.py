"""Record what a scheduler hears and decides: `python -m benchmarks.record --nats URL --out FILE`.

Until Ctrl-C, or for `--seconds`. Prompts are not in it: a scheduler never sees them. Start it before the
scheduler to have all that it knew; `python -m benchmarks.replay FILE` decides again.

It listens where schedule requests go. So while it runs, who asks for a pair when no scheduler is there learns
of that by a timeout (1 s at the gateway), not at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
from nats.aio.msg import Msg

from benchmarks.recording import NODE_PREFIX, RECONNECTED, write_line
from flowkv_common.aio import running, stop_on_signals
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import NodeDescriptor

SUBJECTS = (
    subjects.LOAD_ALL,
    subjects.BLOCKS_ALL,
    subjects.SCHEDULE,
    subjects.assignment("*"),
    subjects.event("regime_changed", "*"),
    subjects.event("cap_moved", "*"),
    subjects.event("scale_wanted", "*"),
)


class Recorder:
    """Writes all it is given to `out`, with the time by `clock` since it was made."""

    def __init__(self, out: BinaryIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_lines = 0
        self.num_unreadable = 0
        self._out = out
        self._clock = clock
        self._began = clock()
        self._nodes: dict[str, NodeDescriptor] = {}

    async def on_message(self, msg: Msg) -> None:
        try:
            self._write(msg.subject, msgspec.json.decode(msg.data))
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
        write_line(self._out, self._clock() - self._began, subject, message)
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


async def main(options: argparse.Namespace) -> None:
    stop = stop_on_signals()
    with options.out.open("wb") as out:
        async with connect(options.nats, name="flowkv-record", on_closed=stop.set) as bus:
            recorder = Recorder(out)
            with contextlib.suppress(TimeoutError):
                async with recording(bus, recorder), asyncio.timeout(options.seconds):
                    await stop.wait()
    unreadable = f", {recorder.num_unreadable} messages were no JSON" if recorder.num_unreadable else ""
    print(f"{recorder.num_lines} lines in {options.out}{unreadable}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`make up` prints it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=None, help="until Ctrl-C if not given")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(_options()))
