"""Where the time of a request went: from the gateway's question for a pair to its last token.

  flowkv trace                         the last ten requests, a line each
  flowkv trace chatcmpl-5f2a           one of them, moment by moment
  flowkv trace --last 50 --perfetto f  for ui.perfetto.dev, or chrome://tracing

Gateways remember their last 1,000 requests. How the sums are made: docs/look-inside.md.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowkv.terminal import connected, console, make_parser, write_json
from flowkv_common.errors import NotFound
from flowkv_common.timeline import Span, timeline
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import FindFinished, FinishedRequests, RequestFinished

if TYPE_CHECKING:
    from rich.table import Table

    from flowkv_common.bus.connection import Bus

# Nobody knows how many gateways there are: those that have not answered by then are not waited for.
PATIENCE_S = 0.3
BAR_WIDTH = 40
COLOURS = {
    "turn": "yellow",
    "schedule": "yellow",
    "queue": "yellow",
    "wait": "yellow",
    "reserve": "magenta",
    "chunk": "blue",
    "prefill": "blue",
    "send": "cyan",
    "step": "green",
    "decode": "green",
    "gap": "red",
    "lost": "red",
}


def main(argv: list[str]) -> int:
    parser = make_parser("trace", __doc__)
    parser.add_argument("request_id", nargs="?", default="", help="as the answer has it under `id`")
    parser.add_argument("--last", type=int, default=10, metavar="N", help="so many requests; default 10")
    parser.add_argument("--json", action="store_true", help="all that is known, for a script")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="write trace events there")
    options = parser.parse_args(argv)
    found = asyncio.run(_look(options))
    if options.request_id and not found:
        raise NotFound(
            f"no gateway remembers {options.request_id}: each has its last 1,000 requests, "
            "`flowkv trace` lists the newest"
        )
    if options.perfetto:
        options.perfetto.write_bytes(msgspec.json.encode(trace_events(found)))
        print(f"{len(found)} requests in {options.perfetto}: open it at ui.perfetto.dev")
    elif options.json:
        write_json(
            [{"request": one, "timeline": [span._asdict() for span in timeline(one)]} for one in found]
        )
    elif options.request_id:
        for line in heading(found[0]):
            console().print(line)
        console().print(span_table(found[0]))
    elif found:
        console().print(request_table(found))
    else:
        print("no request has ended here yet")
    return 0


async def _look(options: argparse.Namespace) -> list[RequestFinished]:
    async with connected(options) as bus:
        return await find_finished(bus, FindFinished(request_id=options.request_id, last=options.last))


async def find_finished(bus: Bus, wanted: FindFinished) -> list[RequestFinished]:
    """What all gateways remember, the newest first, or the one that is asked for."""
    found: list[RequestFinished] = []
    has_found = asyncio.Event()

    def take(answer: FinishedRequests) -> None:
        found.extend(answer.requests)
        if wanted.request_id and found:
            has_found.set()

    inbox = bus.nc.new_inbox()
    async with await bus.subscribe(inbox, FinishedRequests, take):
        await bus.publish(subjects.FINISHED, wanted, reply=inbox)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await has_found.wait()
    newest = sorted(found, key=lambda event: event.began_at, reverse=True)
    return newest[: 1 if wanted.request_id else wanted.last]


# --- how it is shown -------------------------------------------------------------------------------


def heading(event: RequestFinished) -> Iterator[str]:
    phases = event.phases_s
    ttft = f", first token after {phases['ttft'] * 1000:.1f} ms" if "ttft" in phases else ""
    cached = f" ({event.num_cached_tokens} cached)" if event.num_cached_tokens else ""
    yield f"[bold]{event.request_id}[/]  {event.outcome}, {age(event)}"
    yield (
        f"{event.num_prompt_tokens} tokens of prompt{cached}, {event.num_output_tokens} of output; "
        f"{event.prefill_node or 'nobody'} to {event.decode_node or 'nobody'}; "
        f"{phases.get('total', 0.0) * 1000:.1f} ms{ttft}"
    )
    for attempt in event.attempt_times:
        if attempt.assignment is None:
            continue
        yield f"[dim]this pair: {attempt.assignment.reason}[/]"
        candidates = [*attempt.assignment.prefill_candidates, *attempt.assignment.decode_candidates]
        for one in candidates:
            yield f"[dim]  {one.node_id} {one.predicted_s * 1000:.1f} ms: {one.reason}[/]"
    if event.error:
        yield f"[red]{event.error}[/]"


def age(event: RequestFinished) -> str:
    """When it began, as people say it. Two hosts' clocks are compared: a difference below 0 is none."""
    seconds = max(0.0, time.time() - event.began_at)
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"


def span_table(event: RequestFinished) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    spans = timeline(event)
    in_line = [span.took_s for span in spans if not span.is_beside]
    table.add_column("phase", footer="sum")
    table.add_column("where")
    table.add_column("at ms", justify="right")
    table.add_column("ms", justify="right", footer=f"{sum(in_line) * 1000:.1f}")
    table.add_column("", no_wrap=True, footer="+ beside the others, not in the sum")
    table.add_column("", ratio=1)
    total_s = event.phases_s.get("total", 0.0) or sum(in_line)
    for span in spans:
        name = f"+ {span.name}" if span.is_beside else span.name
        figures = f"{span.began_s * 1000:.1f}", f"{span.took_s * 1000:.1f}"
        table.add_row(name, span.where or "bus", *figures, drawn([span], total_s), escape(span.detail))
    return table


def request_table(events: Sequence[RequestFinished]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("request", "began", "pair"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "output", "ttft ms", "ms"):
        table.add_column(name, justify="right")
    table.add_column(
        "[yellow]waits[/] [blue]prompt[/] [cyan]KV[/] [green]decode[/] [red]lost[/]", no_wrap=True
    )
    table.add_column("ended")
    longest_s = max(event.phases_s.get("total", 0.0) for event in events)
    for event in events:
        in_line = [span for span in timeline(event) if not span.is_beside]
        table.add_row(
            event.request_id,
            age(event),
            f"{event.prefill_node} > {event.decode_node}",
            str(event.num_prompt_tokens),
            str(event.num_output_tokens),
            f"{event.phases_s['ttft'] * 1000:.0f}" if "ttft" in event.phases_s else "",
            f"{event.phases_s.get('total', 0.0) * 1000:.0f}",
            drawn(in_line, longest_s),
            event.outcome,
        )
    return table


def drawn(spans: Sequence[Span], total_s: float) -> str:
    """Spans at their places on a line of `BAR_WIDTH` cells, in rich's markup. Each has one at least."""
    cells = [" "] * BAR_WIDTH
    scale = BAR_WIDTH / total_s if total_s else 0.0
    for span in spans:
        first = min(int(span.began_s * scale), BAR_WIDTH - 1)
        end = max(first + 1, round((span.began_s + span.took_s) * scale))
        colour = COLOURS.get(span.name, "white")
        mark = "░" if span.is_beside else "█"
        cells[first:end] = [f"[{colour}]{mark}[/]"] * (min(end, BAR_WIDTH) - first)
    return "".join(cells)


def trace_events(events: Sequence[RequestFinished]) -> dict[str, Any]:
    """In Chrome's format: a process per request, a thread per service, microseconds."""
    written: list[dict[str, Any]] = []
    first_at = min((event.began_at for event in events), default=0.0)
    for pid, event in enumerate(reversed(events), 1):
        written.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": event.request_id}})
        threads: dict[str, int] = {}
        for span in timeline(event):
            thread = f"{span.where or 'bus'}{', beside' if span.is_beside else ''}"
            if thread not in threads:
                threads[thread] = len(threads) + 1
                name = {"ph": "M", "name": "thread_name", "pid": pid, "tid": threads[thread]}
                written.append({**name, "args": {"name": thread}})
            written.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": pid,
                    "tid": threads[thread],
                    "ts": round((event.began_at - first_at + span.began_s) * 1e6),
                    "dur": round(span.took_s * 1e6),
                    "args": {"detail": span.detail},
                }
            )
    return {"traceEvents": written, "displayTimeUnit": "ms"}
