"""What runs, live: nodes with batch, queue, pool and chunk budget; lendings; where requests spent their time.

  flowkv top                  of the `flowkv up` in this folder, until Ctrl-C
  flowkv top --nats URL       of any cluster

For a script: flowkv status --json, flowkv trace --json.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from flowkv.status import decode_tokens_per_s, heading, node_table, status_of
from flowkv.terminal import bar, connected, console, make_parser
from flowkv.trace import find_finished
from flowkv_common.cluster_view import MAX_KEPT, ClusterView, until_complete, viewing
from flowkv_common.errors import CannotStart
from flowkv_common.wire.messages import FindFinished, RequestFinished

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

DRAW_PERIOD_S = 0.5
BAR_WIDTH = 32
SHOWN_MOVES = 3
# Of a request's time, in this order; `phases_s` has each of them, and `total`.
PHASES = {"schedule": "yellow", "queue": "red", "reserve": "magenta", "prefill": "blue", "decode": "green"}


def main(argv: list[str]) -> int:
    options = make_parser("top", __doc__).parse_args(argv)
    if not console().is_terminal:
        raise CannotStart("flowkv top draws on a terminal: in a pipe use `flowkv status --json`")
    asyncio.run(_draw_until_cancelled(options))
    return 0


async def _draw_until_cancelled(options: argparse.Namespace) -> None:
    from rich.live import Live

    async with connected(options) as bus, viewing(bus) as view:
        await until_complete(view)
        for ended in reversed(await find_finished(bus, FindFinished(last=MAX_KEPT))):
            view.on_event(ended)
        with Live(screen(view), console=console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(screen(view), refresh=True)
                await asyncio.sleep(DRAW_PERIOD_S)


def screen(view: ClusterView, height: int = 0) -> Group:
    """All of it; `height` lines of a terminal, its own without."""
    from rich.console import Group

    status = status_of(view)
    height = height or console().height
    lines = [*heading(status), rates(view), *moves(view)]
    left = height - len(lines) - len(status.nodes) - 8  # of the two tables: heads and space
    return Group(*lines, node_table(status.nodes), request_table(view, max(left, 3)))


def rates(view: ClusterView) -> str:
    """Of all nodes together, now."""
    nodes = view.nodes()
    reports = [node.report for node in nodes if node.report]
    decode = sum(decode_tokens_per_s(node) for node in nodes)
    running, waiting = sum(one.num_running for one in reports), sum(one.num_waiting for one in reports)
    prompts, handoffs = sum(one.num_prompts for one in reports), sum(one.num_handoffs for one in reports)
    decoding = f"[bold]{decode:.0f}[/] tokens/s, {running} decoding, {waiting} waiting"
    return f"now:        {decoding}, {prompts} prompts, {handoffs} handoffs"


def moves(view: ClusterView) -> Iterator[str]:
    """Nodes that were lent or taken back, the newest first."""
    for move in islice(reversed(view.moves), SHOWN_MOVES):
        before = "?" if move.before is None else move.before
        yield f"lent:       [yellow]{move.node.node_id}[/] chunk {before} > {move.after}: {move.reason}"


def request_table(view: ClusterView, num_rows: int) -> Table:
    """The last requests, the newest first, with where their time went."""
    from rich import box
    from rich.table import Table

    legend = " ".join(f"[{colour}]{name}[/]" for name, colour in PHASES.items())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("request", no_wrap=True, max_width=20)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("TTFT", justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column(legend, no_wrap=True)
    table.add_column("nodes, KV", no_wrap=True)
    shown = list(islice(reversed(view.finished), num_rows))
    longest_s = max((one.phases_s.get("total", 0.0) for one in shown), default=0.0)
    by_request = {one.transfer_id.rpartition(".")[0]: one for one in view.transfers}
    for one in shown:
        moved = by_request.get(one.request_id)
        how = f" {moved.connector} {moved.num_bytes / 1e6:.1f} MB" if moved else ""
        where = f"{one.prefill_node} > {one.decode_node}{how}" if one.prefill_node else one.error or ""
        cached = f" ({one.num_cached_tokens})" if one.num_cached_tokens else ""
        table.add_row(
            one.request_id,
            f"{one.num_prompt_tokens}{cached} + {one.num_output_tokens}",
            _seconds(one, "ttft"),
            _seconds(one, "total"),
            phase_bar(one, longest_s),
            where,
        )
    return table


def phase_bar(request: RequestFinished, longest_s: float) -> str:
    """Its phases on a scale on which the longest request fills the bar."""
    if longest_s <= 0.0:
        return ""
    shares = [(request.phases_s.get(name, 0.0) / longest_s, colour) for name, colour in PHASES.items()]
    return bar(shares, BAR_WIDTH)


def _seconds(request: RequestFinished, phase: str) -> str:
    seconds = request.phases_s.get(phase)
    return "" if seconds is None else f"{seconds:.3f}"
