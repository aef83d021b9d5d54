"""The node's process: opens what it needs, announces itself, serves, drains, closes.

One number makes a node a prefill, a decode or a mixed node: its prefill chunk budget. Weights, pool and
running work don't depend on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from flowkv_common import __version__
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import NodeIdTaken, claim_node_id, keep_announced, watch_nodes
from flowkv_common.config import SUBJECT_CHARACTERS, NodeSettings, listed
from flowkv_common.errors import Unavailable
from flowkv_common.grammar import Grammars
from flowkv_common.telemetry import serve_http, service_app
from flowkv_common.tracing import open_tracing
from flowkv_common.wire.limits import hashes_that_fit, payload_for, window_that_fits
from flowkv_common.wire.messages import ModelCard, NodeRef, PoolLayout
from flowkv_common.wire.nodes import PROTOCOL, NodeDescriptor
from flowkv_engine.engine.model import CPU, LoadedModel
from flowkv_engine.engine.runner import DeviceLost, Engine, EngineThread, Runner
from flowkv_engine.kv.pool import layer_views
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.sockets import Place, join_host_port
from flowkv_engine.transport.tls import Tls
from flowkv_node.cores import busy_cores
from flowkv_node.endpoints import serve_endpoints, watch_cancels
from flowkv_node.memory import make_pool
from flowkv_node.node import Node, Roles
from flowkv_node.reporting import BlockNews, report_load
from flowkv_node.steps import run_steps

log = logging.getLogger(__name__)

SUPERVISE_PERIOD_S = 0.5
CHECK_BLOCKS_PERIOD_S = 10.0
# A step stalls that takes so many times what it should, and so long: a prompt elsewhere costs a handful of
# messages. Shorter ones may be a kernel that is compiled, or a host that is busy.
STALL_FACTOR = 10.0
SHORTEST_STALL_S = 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """All that a node needs of a model. `make_engine` gets the pool's tensor, of `layout` and on `device`."""

    card: ModelCard
    layout: PoolLayout
    make_engine: Callable[[Tensor], Engine]
    device: torch.device = CPU
    grammars: Grammars | None = None  # None: the engine knows none
    num_threads: int = 0  # that compute; 0: the host's cores don't


def served_model(model: LoadedModel, settings: NodeSettings) -> ServedModel:
    """A loaded model, computed on a separate thread."""
    layout = model.layout(settings.block_size, settings.kv_dtype)
    return ServedModel(
        card=model.card,
        layout=layout,
        device=model.device,
        grammars=model.grammars,
        num_threads=0 if settings.is_on_gpu else torch.get_num_threads(),
        make_engine=lambda pool: EngineThread(
            Runner(
                model,
                layer_views(pool, layout),
                attention=settings.attention,
                max_num_seqs=settings.max_num_seqs,
                token_budget=settings.token_budget,
            )
        ),
    )


async def serve_node(
    settings: NodeSettings, starts_as: str, model: ServedModel, roles: Roles, stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then drain. A process may serve several nodes, each with its own `stop`.

    `starts_as`: prefill, decode or mixed; it sets the prefill chunk budget that the node starts with.

    Raises `Unavailable` when NATS can't be reached or has closed the connection for good.
    """
    own_id = f"{starts_as}-{socket.gethostname().lower()}-{secrets.token_hex(2)}"
    node_id = settings.node_id or re.sub(f"[^{SUBJECT_CHARACTERS}]", "-", own_id)
    ref = NodeRef(node_id=node_id, incarnation=secrets.token_hex(4))
    tls = _data_tls(settings)
    async with contextlib.AsyncExitStack() as opened:
        pool = opened.enter_context(make_pool(settings, model.layout, model.device))
        engine = await opened.enter_async_context(model.make_engine(pool.tensor))
        service = f"flowkv-{starts_as}"
        tracing = await opened.enter_async_context(open_tracing(service, node_id))
        bus = await opened.enter_async_context(
            connect(settings, name=f"{service}/{node_id}", user="node", on_closed=stop.set, tracing=tracing)
        )
        card = _within_messages(model.card, bus, settings.block_size)
        node = Node(ref, settings, starts_as, card, pool, roles, bus, stop, model.grammars)
        place = Place(
            host=settings.host,
            ports=settings.data_ports,
            reached_at=_reached_at(settings),
            reached_on=settings.advertise_port,
            socket_dir=settings.socket_dir or None,
            tls=tls,
        )
        for connector in make_connectors(
            settings.connector_names, pool, node.reservations, node.links.admits, place=place
        ):
            await node.links.listen(await opened.enter_async_context(connector))
        await claim_node_id(bus, node_id)
        app = service_app(node.instruments.registry, node.why_not_ready)
        http_port = await opened.enter_async_context(serve_http(app, settings.host, settings.http_ports))

        # They end in reverse order: endpoints answer until the node is withdrawn, tokens and keepalives go
        # out until the last endpoint has answered.
        news = BlockNews(ref, node.blocks, hashes_that_fit(bus.max_payload))
        async with (
            running(
                _compute(node, engine),
                node.prefill.run(),
                node.decode.run(),
                watch_nodes(bus, node.links.follow, own_id=node_id),
                node.links.run(),
                watch_cancels(node),
                supervise(node, engine),
            ),
            running(node.outbox.keep_alive()),
            serve_endpoints(node, engine, news),
            running(
                _stay_announced(node, http_port, model.num_threads),
                report_load(node),
                news.publish(bus, settings.load_period_s),
            ),
        ):
            log.info("%s is ready: %d blocks", node_id, node.blocks.num_blocks)
            await stop.wait()
            await _drain(node)


def _within_messages(card: ModelCard, bus: Bus, block_size: int) -> ModelCard:
    """The card with a window that NATS can carry. Raises Unavailable if that is next to nothing."""
    window = window_that_fits(bus.max_payload, block_size)
    if window >= card.max_model_len:
        return card
    wanted = payload_for(card.max_model_len, block_size)
    advice = f"set max_payload in the configuration of the NATS server, now {bus.max_payload}, to {wanted}"
    if window <= block_size:
        raise Unavailable(f"NATS can't carry a sequence of {window + 1} tokens: {advice}")
    log.warning(
        "the window is cut from %d to %d tokens, what NATS can carry: %s", card.max_model_len, window, advice
    )
    return msgspec.structs.replace(card, max_model_len=window)


def _reached_at(settings: NodeSettings) -> list[str]:
    """The names under which others reach this node: its host's, where it is bound to all addresses."""
    own = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    return listed(settings.advertise_host) or [own]


def _data_tls(settings: NodeSettings) -> Tls | None:
    """Raises CannotStart if the files can't be used."""
    if not settings.data_tls_cert:
        return None
    tls = Tls(settings.data_tls_cert, settings.data_tls_key, settings.data_tls_ca)
    tls.check()
    return tls


async def _stay_announced(node: Node, http_port: int, num_threads: int) -> None:
    """Until cancelled. A node whose id another incarnation has taken gives its work back and ends."""
    try:
        await keep_announced(node.bus, partial(_describe, node, http_port, num_threads))
    except NodeIdTaken as error:
        node.drain()
        await node.give_back(Unavailable(f"{node.ref.node_id} leaves: {error}"))
        raise


def _describe(node: Node, http_port: int, num_threads: int) -> NodeDescriptor:
    host = _reached_at(node.settings)[0]
    return NodeDescriptor(
        node=node.ref,
        role=node.starts_as,
        model=node.card,
        layout=node.layout,
        num_blocks=node.blocks.num_blocks,
        token_budget=node.settings.token_budget,
        max_prefill_tokens_per_step=node.max_prefill_tokens_per_step,
        hosted_roles=["decode", "prefill"],
        connectors=node.settings.connector_names,
        memory="gpu" if node.settings.is_on_gpu else "host",
        host=host,
        pid=os.getpid(),
        metrics_url=f"http://{join_host_port(host, http_port)}/metrics",
        version=__version__,
        protocol=PROTOCOL,
        has_data_tls=bool(node.settings.data_tls_cert),
        boot_id=_boot_id(),
        num_cores=busy_cores(num_threads),
        num_host_cores=os.cpu_count() or 0,
    )


def _boot_id() -> str:
    """Empty where the kernel does not tell it, as in some sandboxes."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text().strip()
    return ""


# --- serve ---------------------------------------------------------------------------------------


async def _compute(node: Node, engine: Engine) -> None:
    """Until cancelled. A node whose device is lost gives its work back and ends: only a new process helps."""
    try:
        await run_steps(node, engine)
    except DeviceLost as error:
        log.exception("the device is lost")
        node.drain()
        await node.give_back(Unavailable(f"the device of {node.ref.node_id} is lost: {error}"))
        raise


async def supervise(node: Node, engine: Engine) -> None:
    """Until cancelled: see to it that engine and handoffs make progress, and end what is out of time.

    A node whose step stalls is unready, and prompts that it has not begun go elsewhere if another node serves
    prefill. Without progress for longer it gives all of its work back, until there is some again. The blocks
    of a stuck step stay held until it ends, if it ever does. A handoff that can't be ended, such as a thread
    that waits for a device for ever, keeps the node unready.

    Raises IntegrityError if a block is lost: a node that can't count its blocks must not serve.
    """
    node_id, wedge_timeout_s, checked_at = node.ref.node_id, node.settings.wedge_timeout_s, 0.0
    while True:
        slept_at = time.monotonic()
        await asyncio.sleep(SUPERVISE_PERIOD_S)
        now, busy_since = time.monotonic(), engine.busy_since
        was_held_up = now - slept_at > SHORTEST_STALL_S  # the whole process: that is no stall of the engine
        stalls = node.stalls if was_held_up else _step_stalls(node, busy_since, now)
        if stalls != node.stalls:
            node.stalls = stalls
            node.changed.set()
            if stalls:
                log.warning("a step takes far longer than it should: prompts that wait go elsewhere")
                await node.give_back(Unavailable(f"{node_id} stalls"), node.prompts_not_begun())
            else:
                log.warning("steps end again")
        wedged = busy_since is not None and now - busy_since > wedge_timeout_s
        if wedged != node.wedged:
            node.wedged = wedged
            node.changed.set()
            if wedged:
                log.error("the engine has made no progress for %.1f s", wedge_timeout_s)
                await node.give_back(Unavailable(f"the engine of {node_id} is stuck"))
            else:
                log.warning("the engine makes progress again")

        reason = node.handoffs.why_stuck()
        if (reason is None) != (node.stuck is None):
            node.changed.set()
            log.log(
                logging.ERROR if reason else logging.WARNING, reason or "all handoffs make progress again"
            )
        node.stuck = reason
        if stuck := {handoff.transfer_id for handoff in node.handoffs.find_stuck()}:
            await node.give_back(Unavailable(f"{node_id}: {reason}"), stuck)

        if node.drains_until is not None and now > node.drains_until and len(node.attempts):
            await node.give_back(Unavailable(f"{node_id} is draining"))
        if node.bus.is_settled:  # else prefill nodes could not renew their reservations
            for transfer_id in node.reservations.sweep():
                log.info("reservation %s expired", transfer_id)
                node.attempts.end(transfer_id)
                node.wake.set()
        if not len(node.attempts) and now - checked_at > CHECK_BLOCKS_PERIOD_S:
            node.blocks.check_integrity()
            checked_at = now


def _step_stalls(node: Node, busy_since: float | None, now: float) -> bool:
    """Alone for its model a node is as good as it gets, however slow."""
    if busy_since is None or node.expected_step_s is None or not node.links.has_prefill_peer:
        return False
    return now - busy_since > max(SHORTEST_STALL_S, STALL_FACTOR * node.expected_step_s)


# --- drain ---------------------------------------------------------------------------------------


async def _drain(node: Node) -> None:
    """Take nothing new, let what is here finish; what remains at the deadline is given back to gateways."""
    node.drain()
    log.info("draining %s: %d requests", node.ref.node_id, len(node.attempts))
    if not node.bus.is_closed:  # else no gateway hears of what it finishes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(node.settings.drain_timeout_s):
                await node.attempts.wait_empty()
    await node.give_back(Unavailable(f"{node.ref.node_id} leaves"))
