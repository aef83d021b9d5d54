"""What runs: nodes and their roles, links, pools, work, and who leads. From NATS alone.

  flowkv status                       of the `flowkv up` in this folder
  flowkv status --nats URL --json     for a script, of any cluster

It ends with 0 if a request could be served, else with 1. What to do then: flowkv doctor.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from flowkv.terminal import bar, connected, console, make_parser, write_json
from flowkv_common.cluster_view import (
    ClusterView,
    NodeState,
    ServiceInfo,
    could_be_faster,
    until_complete,
    viewing,
)
from flowkv_common.wire.nodes import ScaleWanted

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {
    "ready": "green",
    "draining": "yellow",
    "cordoned": "yellow",
    "normal": "green",
    "imbalance": "yellow",
}
POOL_WIDTH = 16
# As `_figures` gives them; a narrow terminal shows the first ones.
COLUMNS = (
    "decoding",
    "waiting",
    "prompts",
    "pool: [red]leased[/] [cyan]cached[/]",
    "chunk",
    "longest run",
    "prefill/s",
    "decode/s",
)
NARROW_COLUMNS = 4
WIDE = 120


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as `--json` writes it."""

    pairs: list[tuple[str, str]]
    leader: str
    regime: str
    regime_reason: str
    wanted: list[ScaleWanted]
    gateways: list[ServiceInfo]
    schedulers: list[ServiceInfo]
    nodes: list[NodeState]


def main(argv: list[str]) -> int:
    parser = make_parser("status", __doc__)
    parser.add_argument("--json", action="store_true", help="all that is known, for a script")
    options = parser.parse_args(argv)

    async def look() -> Status:
        async with connected(options) as bus, viewing(bus) as view:
            await until_complete(view)
            return status_of(view)

    status = asyncio.run(look())
    if options.json:
        write_json(status)
    else:
        for line in heading(status):
            console().print(line)
        if status.nodes:
            console().print(node_table(status.nodes))
        for line in links(status.nodes):
            console().print(line)
    return 0 if status.pairs and status.leader and status.gateways else 1


def status_of(view: ClusterView) -> Status:
    return Status(
        pairs=view.pairs(),
        leader=view.leader.id if view.leader else "",
        regime=view.regime,
        regime_reason=view.regime_reason,
        wanted=[one for one in view.wanted.values() if one.change],
        gateways=view.services("gateway"),
        schedulers=view.services("scheduler"),
        nodes=view.nodes(),
    )


def heading(status: Status) -> Iterator[str]:
    """What is the same for all nodes, a line each."""
    models = sorted({node.descriptor.model.name for node in status.nodes})
    roles = Counter(node.descriptor.role for node in status.nodes)
    counts = ", ".join(f"{count} {role}" for role, count in roles.items()) or "[red]none[/]"
    yield f"[bold]{', '.join(models) or 'no model'}[/]  nodes: {counts}; pairs: {len(status.pairs)}"
    urls = [one.metadata.get("url") or one.id for one in status.gateways]
    yield f"gateways:   {', '.join(urls) or '[red]none has answered[/]'}"
    standbys = [one.id for one in status.schedulers if one.id != status.leader]
    beside = f"; beside it {', '.join(standbys)}" if standbys else ""
    yield f"schedulers: {status.leader + ' leads' if status.leader else '[red]nobody leads[/]'}{beside}"
    if status.regime:
        why = f": {status.regime_reason}" if status.regime_reason else ""
        yield f"regime:     [{COLOURS.get(status.regime, 'red')}]{status.regime}[/]{why}"
    for one in status.wanted:
        whose = f" of {one.model}" if len(models) > 1 else ""
        yield f"wanted:     [yellow]{one.change:+d} {one.role}{whose}[/]: {one.reason}"


def node_table(nodes: list[NodeState]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    has_several = len({node.descriptor.model.name for node in nodes}) > 1
    for name in ("node", *(("model",) if has_several else ()), "serves", "state"):
        table.add_column(name, no_wrap=name == "node")
    shown = COLUMNS if console().width >= WIDE else COLUMNS[:NARROW_COLUMNS]
    for name in shown:
        table.add_column(name, justify="left" if name.startswith("pool") else "right", no_wrap=True)
    for node in nodes:
        lent = node.descriptor.role not in (*node.serves, "mixed") or len(node.serves) > 1
        serves = "+".join(node.serves) or "nothing"
        if lent and node.descriptor.role != "mixed":
            serves = f"[yellow]{serves}[/], a {node.descriptor.role} node"
        model = (node.descriptor.model.name,) if has_several else ()
        table.add_row(node.node_id, *model, serves, _state(node), *islice(_figures(node), len(shown)))
    return table


def _state(node: NodeState) -> str:
    since = f" for {node.heard_s_ago:.0f} s" if node.state == "silent" and node.heard_s_ago else ""
    return f"[{COLOURS.get(node.state, 'red')}]{node.state}{since}[/]"


def _figures(node: NodeState) -> Iterator[str]:
    if (report := node.report) is None:
        return
    yield f"{report.num_running}/{report.max_num_seqs}"
    yield str(report.num_waiting)
    queued = f" ({report.queued_prefill_tokens} tokens)" if report.queued_prefill_tokens else ""
    yield f"{report.num_prompts}{queued}"
    blocks = report.blocks
    shares = [(blocks.leased + blocks.quarantined, "red"), (blocks.cached, "cyan")]
    drawn = bar([(count / blocks.total, colour) for count, colour in shares], POOL_WIDTH)
    yield f"{drawn} {(blocks.leased + blocks.quarantined) / blocks.total:4.0%} of {blocks.total}"
    yield f"{report.max_prefill_tokens_per_step}/{node.descriptor.token_budget}"
    yield str(blocks.longest_free_run)
    yield f"{report.prefill_tokens_per_s:.0f}"
    yield f"{decode_tokens_per_s(node):.0f}"


def decode_tokens_per_s(node: NodeState) -> float:
    """What the batch brings now: a token per sequence and step."""
    report = node.report
    return report.num_running / report.decode_step_s if report and report.decode_step_s else 0.0


def links(nodes: list[NodeState]) -> Iterator[str]:
    """How KV moves between nodes, most of them in one line; then what could be faster, or is missing."""
    by_id = {node.node_id: node for node in nodes}
    by_connector: dict[str, list[str]] = {}
    for node in nodes:
        for peer in node.links:
            by_connector.setdefault(node.named_link(peer), []).append(f"{node.node_id} to {peer}")
    for connector, pairs in sorted(by_connector.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(pairs[:4]) + (f" and {len(pairs) - 4} more" if len(pairs) > 4 else "")
        how = f"KV by [bold]{connector}[/]" if connector else "[red]KV by nothing (yet)[/]"
        yield f"{how}: {shown}"
    for node in nodes:
        if node.slower_links and could_be_faster(node, by_id):
            yield f"[yellow]slower than it could be:[/] {node.node_id} {node.slower_links}"
