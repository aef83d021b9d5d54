"""The operator's hands: `flowkv cordon`, `drain`, `resume` and `lend` tell one node what to do.

Each waits until the node's own reports show it. In Compose only the operator may, with the operator's URL.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from flowkv.terminal import connected, console, make_parser
from flowkv_common.bus.connection import CONTROL_TIMEOUT_S, Bus
from flowkv_common.cluster_view import ClusterView, NodeState, until_complete, viewing
from flowkv_common.errors import BadRequest, DeadlineExceeded, NotFound
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Message
from flowkv_common.wire.nodes import (
    Check,
    Checked,
    Cordon,
    Drain,
    LoadReport,
    ResumeNode,
    SetPrefillCap,
    starting_chunk_budget,
)

LOOK_EVERY_S = 0.1
ASK_EVERY_S = 0.3  # a node counts its blocks for each answer


def cordon(argv: list[str]) -> int:
    """A node takes nothing new and keeps what it has, however long; another scheduler changes nothing of it.

    flowkv cordon decode-0 --reason 'odd noise'     and later: flowkv resume decode-0
    """
    parser = _parser("cordon", cordon.__doc__)
    parser.add_argument("--reason", default="", help="for people: in the node's log")
    options = parser.parse_args(argv)

    async def go() -> None:
        async with _node_of(options) as (bus, view, node):
            await _order(bus, subjects.NODE_CORDON, node, Cordon(reason=options.reason))
            await _until(view, node.node_id, lambda report: report.is_cordoned)
            report = _now(view, node.node_id).report
            left = num_in_hand(report) if report else 0
            console().print(
                f"{node.node_id} takes nothing new and goes on with the {left} that it has; "
                f"take it back: flowkv resume {node.node_id}"
            )

    asyncio.run(go())
    return 0


def drain(argv: list[str]) -> int:
    """A node takes nothing new and finishes what it has; this ends when nothing is left there.

    flowkv drain decode-0 --reason 'new fan'     and later: flowkv resume decode-0
    """
    parser = _parser("drain", drain.__doc__)
    parser.add_argument("--reason", default="", help="for people: in the node's log")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="longest wait until it is empty"
    )
    options = parser.parse_args(argv)

    async def go() -> None:
        async with _node_of(options) as (bus, view, node):
            await _order(bus, subjects.NODE_DRAIN, node, Drain(reason=options.reason))
            console().print(f"{node.node_id} takes nothing new")
            told = -1

            def is_empty(report: LoadReport) -> bool:
                nonlocal told
                if (left := num_in_hand(report)) != told:
                    console().print(f"{node.node_id} has {left} in hand")
                    told = left
                return report.draining and not left

            gives_up_at = time.monotonic() + options.timeout
            await _until(view, node.node_id, is_empty, options.timeout)
            await _until_let_go(bus, node.node_id, options.timeout, gives_up_at)
            console().print(
                f"{node.node_id} is empty: stop it, or take it back: flowkv resume {node.node_id}"
            )

    asyncio.run(go())
    return 0


def resume(argv: list[str]) -> int:
    """A drained or cordoned node takes new work again."""
    options = _parser("resume", resume.__doc__).parse_args(argv)

    async def go() -> None:
        async with _node_of(options) as (bus, view, node):
            await _order(bus, subjects.NODE_RESUME, node, ResumeNode())
            await _until(view, node.node_id, lambda report: report.ready)
            console().print(f"{node.node_id} takes new work")

    asyncio.run(go())
    return 0


def lend(argv: list[str]) -> int:
    """Move a node's prefill chunk budget: to prefill, to decode, to both, or to so many tokens per step.

    The scheduler moves it again where more requests are served in time, unless FLOWKV_LENDING=false.

    flowkv lend decode-1 prefill
    """
    parser = _parser("lend", lend.__doc__)
    parser.add_argument("to", help="prefill, decode, both, or tokens per step")
    options = parser.parse_args(argv)

    async def go() -> None:
        async with _node_of(options) as (bus, view, node):
            budget = _chunk_budget(options.to, node)
            leader = view.leader
            epoch = int(leader.metadata.get("epoch", 0)) if leader else 0
            order = SetPrefillCap(
                node=node.descriptor.node,
                epoch=max(epoch, node.report.epoch if node.report else 0),
                max_prefill_tokens_per_step=budget,
                reason="an operator said so",
            )
            await _order(bus, subjects.NODE_CAP, node, order)
            await _until(view, node.node_id, lambda report: report.max_prefill_tokens_per_step == budget)
            before = (node.report or node.descriptor).max_prefill_tokens_per_step
            console().print(
                f"{node.node_id} computes up to {budget} prompt tokens per step, it was {before}: "
                f"it serves {' and '.join(_now(view, node.node_id).serves)}"
            )

    asyncio.run(go())
    return 0


def num_in_hand(report: LoadReport) -> int:
    """Prompts, sequences and handoffs."""
    return report.num_prompts + report.num_running + report.num_waiting + report.num_handoffs


def _chunk_budget(to: str, node: NodeState) -> int:
    """Raises BadRequest."""
    least, most = node.descriptor.layout.block_size, node.descriptor.token_budget
    if to in ("prefill", "decode", "both"):
        return starting_chunk_budget(to, most, least)
    if to.isdecimal() and least <= int(to) <= most:
        return int(to)
    raise BadRequest(f"{to!r} is none of prefill, decode, both, and no number from {least} to {most}")


def _parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    parser = make_parser(command, doc or "")
    parser.add_argument("node", help="its id, as `flowkv status` shows it")
    return parser


@asynccontextmanager
async def _node_of(options: argparse.Namespace) -> AsyncIterator[tuple[Bus, ClusterView, NodeState]]:
    """Raises NotFound if no such node is known."""
    async with connected(options) as bus, viewing(bus) as view:
        await until_complete(view)
        yield bus, view, _now(view, options.node)


def _now(view: ClusterView, node_id: str) -> NodeState:
    nodes = {node.node_id: node for node in view.nodes()}
    if node_id not in nodes:
        known = ", ".join(nodes) or "none is there"
        raise NotFound(f"there is no node {node_id!r}: {known}")
    return nodes[node_id]


async def _order(bus: Bus, endpoint: str, node: NodeState, order: Message) -> None:
    subject = subjects.at(endpoint, node.node_id)
    await bus.request(subject, order, Accepted, timeout_s=CONTROL_TIMEOUT_S)


async def _until(
    view: ClusterView, node_id: str, is_met: Callable[[LoadReport], bool], timeout_s: float = 5.0
) -> None:
    """Until a report of the node is so. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout(timeout_s):
            while (report := _now(view, node_id).report) is None or not is_met(report):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_EVERY_S)
    except TimeoutError:
        state = _now(view, node_id)
        left = num_in_hand(state.report) if state.report else 0
        what = f"{node_id} is {state.state} with {left} in hand"
        raise DeadlineExceeded(f"not done within {timeout_s:g} s: {what}") from None


async def _until_let_go(bus: Bus, node_id: str, timeout_s: float, gives_up_at: float) -> None:
    """Until no request needs the node. Reports don't tell of those whose KV is still to come.

    Raises DeadlineExceeded.
    """
    told = 0
    while True:
        subject = subjects.at(subjects.NODE_CHECK, node_id)
        checked = await bus.request(subject, Check(), Checked, timeout_s=CONTROL_TIMEOUT_S)
        if not (left := checked.num_requests):
            return
        waits_for = f"{node_id} is still needed by {left}: their KV is yet to come or to go"
        if time.monotonic() > gives_up_at:
            raise DeadlineExceeded(f"not done within {timeout_s:g} s: {waits_for}")
        if left != told:
            console().print(waits_for)
            told = left
        await asyncio.sleep(ASK_EVERY_S)
