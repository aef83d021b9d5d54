"""What `flowkv up` shows: how far each process has come, then a line per request. Read from their logs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from flowkv.processes import Process

# What a node says when it has come so far, and what it does next. The last stage ends when it has its links.
STAGES = {
    "starts": "imports",
    "loading ": "weights",
    "loaded ": "kernels",
    "connected to NATS": "joins",
    "is ready": "links",
}
LINKED = ("linked to ", "KV goes to ")
# A terminal can't be read any faster; the rest is counted.
MAX_LINES_PER_LOOK = 20


class Log:
    """The lines that one process has written since it was started."""

    def __init__(self, process: Process) -> None:
        self._file = process.log_path.open("rb")
        self._file.seek(process.log_begins_at)
        self._rest = b""

    def news(self) -> Iterator[dict[str, Any]]:
        """What has come since the last call; a line that is no JSON object is left out."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry

    def close(self) -> None:
        self._file.close()


class NodeProgress:
    """How far a node has come: `stage` says what it does, `share` is 1 when it serves."""

    def __init__(self, num_peers: int) -> None:
        self.stage = STAGES["starts"]
        self._num_peers = num_peers
        self._peers: set[str] = set()

    def hear(self, message: str) -> None:
        for said, stage in STAGES.items():
            if said in message:
                self.stage = stage
        for said in LINKED:
            if message.startswith(said):
                self._peers.add(message.removeprefix(said).split(" ", 1)[0])

    @property
    def is_whole(self) -> bool:
        return self.stage == "links" and len(self._peers) >= self._num_peers

    @property
    def share(self) -> float:
        if self.is_whole:
            return 1.0
        links = len(self._peers) / self._num_peers if self.stage == "links" and self._num_peers else 0.0
        return (list(STAGES.values()).index(self.stage) + links) / len(STAGES)

    def __str__(self) -> str:
        if self.is_whole:
            return "serves"
        return f"links {len(self._peers)}/{self._num_peers}" if self.stage == "links" else self.stage


class StartProgress:
    """A bar per node while a cluster starts, where there is a terminal; else a line when a node serves."""

    def __init__(
        self, processes: Mapping[str, Process], nodes: Sequence[str], say: Callable[[str], None], live: bool
    ) -> None:
        self._logs = {name: Log(processes[name]) for name in nodes}
        self._nodes = {name: NodeProgress(len(nodes) - 1) for name in nodes}
        self._told: set[str] = set()
        self._say = say
        self._bars = _bars() if live else None
        self._tasks: dict[str, Any] = {}  # of the bars

    def look(self) -> None:
        """Read what is new in the logs, and show it."""
        for name, node in self._nodes.items():
            for entry in self._logs[name].news():
                node.hear(str(entry.get("message", "")))
            if self._bars is not None:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=1.0, what="")
                self._bars.update(self._tasks[name], completed=node.share, what=str(node))
            elif node.is_whole and name not in self._told:
                self._told.add(name)
                self._say(f"{name} serves")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look()
        if self._bars is not None:
            self._bars.stop()
        for log in self._logs.values():
            log.close()


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("  {task.description:<12}"), BarColumn(), TextColumn("{task.fields[what]:<12}"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def request_lines(log: Log) -> Iterator[str]:
    """A line per request that has ended since the last call, of the gateway's log."""
    ended = [entry for entry in log.news() if entry.get("message") == "request ended"]
    yield from map(request_line, ended[:MAX_LINES_PER_LOOK])
    if len(ended) > MAX_LINES_PER_LOOK:
        yield f"  and {len(ended) - MAX_LINES_PER_LOOK} more requests"


def request_line(entry: Mapping[str, Any]) -> str:
    """When, how it ended, its tokens and times, and where it ran: of the log line of one request."""
    cached = f" ({entry['num_cached_tokens']} cached)" if entry.get("num_cached_tokens") else ""
    num_output, ttft_s = int(entry.get("num_output_tokens", 0)), entry.get("ttft_s")
    parts = [time.strftime("%H:%M:%S"), f"{entry.get('status')} {entry.get('finish_reason') or '-'}"]
    parts.append(f"{entry.get('num_prompt_tokens', 0)}{cached} + {num_output} tokens")
    if ttft_s is not None:
        decode_s = float(entry["total_s"]) - float(ttft_s)
        parts.append(f"TTFT {ttft_s:.3f} s")
        if num_output > 1 and decode_s > 0:
            parts.append(f"then {(num_output - 1) / decode_s:.0f} tokens/s")
    if entry.get("prefill_node"):
        parts.append(f"{entry['prefill_node']} > {entry['decode_node']}")
    if entry.get("error"):
        parts.append(str(entry.get("reason") or entry["error"]))
    return "  ".join(parts)
