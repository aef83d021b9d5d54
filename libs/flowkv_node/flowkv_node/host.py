"""The node's process: opens what it needs, hosts the guests, reports, drains, leaves.

A node is a prefill, a decode or a mixed node by one number only, its prefill cap; weights, pool and running
work don't depend on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from flowkv_common import __version__
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import NodeIdTaken, claim_node_id, keep_announced, watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import NODE_ID_CHARACTERS, NodeSettings
from flowkv_common.errors import Unavailable
from flowkv_common.telemetry import serve_http, service_app
from flowkv_common.wire.messages import (
    ModelCard,
    NodeRef,
    PoolLayout,
    hashes_that_fit,
    payload_for,
    window_that_fits,
)
from flowkv_common.wire.nodes import NodeDescriptor, starting_chunk_budget
from flowkv_engine.engine.model import CPU, LoadedModel, kv_dtype
from flowkv_engine.engine.runner import DeviceLost, Engine, EngineThread, Runner
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.sockets import Place, join_host_port
from flowkv_node.attempts import Attempts
from flowkv_node.budget import HandoffBudget
from flowkv_node.endpoints import node_endpoints, sweep, watch_cancels, watch_engine, watch_handoffs
from flowkv_node.links import Links
from flowkv_node.memory import handoff_bytes, make_pool
from flowkv_node.node import GuestFactory, Node
from flowkv_node.outbox import Outbox
from flowkv_node.reporting import BlockNews, report_load
from flowkv_node.steps import Instruments, Retire, Steps

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """All that a node needs of a model. `make_engine` gets the pool's tensor, of `layout` and on `device`."""

    card: ModelCard
    layout: PoolLayout
    make_engine: Callable[[Tensor], Engine]
    device: torch.device = CPU


def served(model: LoadedModel, settings: NodeSettings) -> Served:
    """A loaded model as nodes serve it: computed on a thread of its own."""
    return Served(
        card=model.card,
        layout=model.layout(settings.block_size, kv_dtype(settings.kv_dtype, model.dtype)),
        device=model.device,
        make_engine=lambda pool: EngineThread(
            Runner(
                model,
                pool,
                attention=settings.attention,
                max_num_seqs=settings.max_num_seqs,
                token_budget=settings.token_budget,
            )
        ),
    )


async def serve(
    settings: NodeSettings, role: str, model: Served, guests: Mapping[str, GuestFactory], stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then drain. A process may serve several nodes, each with its own `stop`.

    `role`: what the node starts as. `guests`: what it hosts, by role.

    Raises `Unavailable` when NATS can't be reached or has closed the connection for good.
    """
    async with contextlib.AsyncExitStack() as opened:
        node, steps, engine = await _open(settings, role, model, guests, stop, opened)
        await claim_node_id(node.bus, node.ref.node_id)
        app = service_app(node.instruments.registry, node.why_not_ready)
        port = await opened.enter_async_context(serve_http(app, settings.host, settings.http_port))

        def descriptor() -> NodeDescriptor:
            return _describe(node, steps, role, port)

        news = BlockNews(node.ref, node.blocks, hashes_that_fit(node.bus.max_payload))
        running_guests = [guest.run() for guest in node.guests.values()]
        watches = (watch_cancels(node), watch_engine(node, engine), watch_handoffs(node), sweep(node))
        links = (watch_nodes(node.bus, node.links.follow), node.links.run())
        async with running(_compute(node, steps), *running_guests, *links, *watches):
            async with running(node.outbox.keep_alive()), _services(node, steps, engine, news, role):
                tell_news = news.tell(node.bus, settings.load_period_s)
                stay_known = _stay_announced(node, descriptor)
                async with running(stay_known, report_load(node, steps), tell_news):
                    log.info("%s is ready: %d blocks", node.ref.node_id, node.blocks.num_blocks)
                    await node.stop.wait()
                    await _drain(node)


async def _compute(node: Node, steps: Steps) -> None:
    """Until cancelled. A node whose device is lost gives its work back and ends: only a new process helps."""
    try:
        await steps.run()
    except DeviceLost as error:
        log.exception("the device is lost")
        node.drain()
        await node.fail_all(Unavailable(f"the device of {node.ref.node_id} is lost: {error}"))
        raise


async def _stay_announced(node: Node, descriptor: Callable[[], NodeDescriptor]) -> None:
    """Until cancelled. A node whose id another life has taken gives its work back and ends."""
    try:
        await keep_announced(node.bus, descriptor)
    except NodeIdTaken as error:
        node.drain()
        await node.fail_all(Unavailable(f"{node.ref.node_id} leaves: {error}"))
        raise


async def _open(
    settings: NodeSettings,
    role: str,
    model: Served,
    guests: Mapping[str, GuestFactory],
    stop: asyncio.Event,
    opened: contextlib.AsyncExitStack,
) -> tuple[Node, Steps, Engine]:
    """Everything a node consists of, each entered into `opened` in the order in which it may be used."""
    ref = NodeRef(node_id=_node_id(settings.node_id, role), incarnation=secrets.token_hex(4))
    layout = model.layout
    pool = opened.enter_context(make_pool(settings, layout, model.device))
    num_blocks = pool.num_blocks
    engine = await opened.enter_async_context(model.make_engine(pool.tensor))
    connection = connect(settings.nats_url, name=f"flowkv-{role}/{ref.node_id}", on_closed=stop.set)
    bus = await opened.enter_async_context(connection)
    blocks = Blocks(num_blocks, settings.block_size)
    reservations = Reservations(blocks)
    attempts = Attempts()
    instruments = Instruments(model.card.name, ref.node_id)
    instruments.expect_connectors(settings.connector_names)
    instruments.block_gauges(blocks.counts)
    links = Links(bus, ref, layout, model.card.fingerprint, num_blocks)
    place = Place(
        host=settings.host,
        port=settings.data_port,
        reached_at=_reached_at(settings),
        reached_on=settings.advertise_port,
        socket_dir=settings.socket_dir or None,
    )
    for connector in make_connectors(settings.connector_names, pool, reservations, links.admits, place=place):
        await links.listen(await opened.enter_async_context(connector))
    retire = Retire(blocks)
    node = Node(
        ref=ref,
        settings=settings,
        card=_within_messages(model.card, bus, settings.block_size),
        layout=layout,
        bus=bus,
        blocks=blocks,
        reservations=reservations,
        attempts=attempts,
        outbox=Outbox(bus, ref, attempts),
        links=links,
        budget=HandoffBudget(
            settings.max_handoffs,
            handoff_bytes(settings, layout, num_blocks),
            node_moved_at=lambda: max(retire.moved_at, reservations.renewed_at),
        ),
        instruments=instruments,
        retire=retire,
        wake=asyncio.Event(),
        changed=asyncio.Event(),
        stop=stop,
    )
    node.guests.update((name, make(node)) for name, make in guests.items())
    steps = Steps(
        engine,
        node.guests.values,
        node.outbox,
        retire,
        instruments,
        block_size=settings.block_size,
        token_budget=settings.token_budget,
        max_prefill_tokens_per_step=starting_chunk_budget(role, settings.token_budget, settings.block_size),
        wake=node.wake,
    )
    instruments.gauge(
        "flowkv_max_prefill_tokens_per_step",
        "Prompt tokens per step, at most: what makes a node prefill or decode",
        lambda: steps.max_prefill_tokens_per_step,
    )
    return node, steps, engine


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


@contextlib.asynccontextmanager
async def _services(
    node: Node, steps: Steps, engine: Engine, news: BlockNews, role: str
) -> AsyncIterator[None]:
    """One ADR-32 service per guest and one for the node, found by `nats micro ls`."""

    def metadata() -> dict[str, str]:
        """What `nats micro info` shows of each service of the node."""
        return {
            "role": role,
            "model": node.card.name,
            "incarnation": node.ref.incarnation,
            "state": node.why_not_ready() or "ready",
        }

    endpoints: dict[str, list[Endpoint]] = {name: guest.endpoints() for name, guest in node.guests.items()}
    endpoints["node"] = node_endpoints(node, steps, engine, news)
    async with contextlib.AsyncExitStack() as stack:
        for name, mine in endpoints.items():
            service = Service(
                node.bus,
                name=name,
                version=__version__,
                service_id=node.ref.node_id,
                metadata=metadata,
                endpoints=mine,
            )
            await stack.enter_async_context(service)
        yield


async def _drain(node: Node) -> None:
    """Take nothing new, let what is here finish; what remains at the deadline is given back to gateways."""
    node.drain()
    log.info("draining %s: %d requests", node.ref.node_id, len(node.attempts))
    if not node.bus.is_closed:  # else nobody hears of what it finishes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(node.settings.drain_timeout_s):
                await node.attempts.wait_empty()
    await node.fail_all(Unavailable(f"{node.ref.node_id} leaves"))


def _describe(node: Node, steps: Steps, role: str, http_port: int) -> NodeDescriptor:
    host = _reached_at(node.settings)
    return NodeDescriptor(
        node=node.ref,
        role=role,
        model=node.card,
        layout=node.layout,
        num_blocks=node.blocks.num_blocks,
        token_budget=node.settings.token_budget,
        max_prefill_tokens_per_step=steps.max_prefill_tokens_per_step,
        hosted_roles=sorted(node.guests),
        connectors=node.settings.connector_names,
        memory="gpu" if node.settings.is_on_gpu else "host",
        host=host,
        pid=os.getpid(),
        metrics_url=f"http://{join_host_port(host, http_port)}/metrics",
        version=__version__,
    )


def _reached_at(settings: NodeSettings) -> str:
    """The name under which others reach this node: its host's, where it is bound to all addresses."""
    own = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    return settings.advertise_host or own


def _node_id(wanted: str, role: str) -> str:
    """The name asked for, or one that nobody else has."""
    own = f"{role}-{socket.gethostname().lower()}-{secrets.token_hex(2)}"
    return wanted or re.sub(f"[^{NODE_ID_CHARACTERS}]", "-", own)
