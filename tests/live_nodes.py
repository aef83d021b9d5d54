"""Real nodes in the test's own process, on a tiny model, and a client that gives them work over NATS."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from flowkv.roles import ROLES
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import NodeSettings
from flowkv_common.errors import FlowKVError, from_wire
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Grammar,
    Keepalive,
    KeepaliveReply,
    Message,
    NodeRef,
    Release,
    Reserved,
    SamplingParams,
    StepTokens,
    TokenChunk,
    TokenLogprob,
    transfer_id,
)
from flowkv_common.wire.nodes import (
    Check,
    Checked,
    Cordon,
    Drain,
    LoadReport,
    NodeDescriptor,
    ResumeNode,
    SetPrefillCap,
    Wedge,
)
from flowkv_engine.engine.model import LoadedModel
from flowkv_node.host import serve_node, served_model
from tests.nats_server import NatsServer
from tests.node_messages import prefill_run, reserve

BLOCK_SIZE = 8
TOKEN_BUDGET = 64
TIMEOUT_S = 20.0

Heard = asyncio.Queue[LoadReport]


@contextlib.asynccontextmanager
async def live_node(
    server: NatsServer,
    bus: Bus,
    model: LoadedModel,
    node_id: str,
    *,
    role: str = "mixed",
    num_blocks: int = 64,
    peers: int = 0,
    **settings: Any,
) -> AsyncIterator[NodeRef]:
    """A node from its first load report, with links to so many peers, to the end of its drain."""
    own = node_settings(server, model, node_id, num_blocks, **settings)
    stop = asyncio.Event()
    async with reports(bus, node_id) as heard, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_node(own, role, served_model(model, own), ROLES, stop))
        ready = await first(heard, lambda report: report.ready and report.num_links >= peers)
        try:
            yield ready.node
        finally:
            stop.set()


def node_settings(
    server: NatsServer, model: LoadedModel, node_id: str, num_blocks: int = 64, **settings: Any
) -> NodeSettings:
    """Those of a small node that is quick to report and to end."""
    values = {
        "nats_url": server.url,
        "model_path": "",
        "node_id": node_id,
        "attention": "torch",
        "block_size": BLOCK_SIZE,
        "token_budget": TOKEN_BUDGET,
        "kv_cache_bytes": num_blocks * model.layout(BLOCK_SIZE, "float32").block_bytes,
        "load_period_s": 0.05,
        "drain_timeout_s": 1.0,
    }
    return NodeSettings(**{**values, **settings})


@contextlib.asynccontextmanager
async def reports(bus: Bus, node_id: str) -> AsyncIterator[Heard]:
    """Collects the load reports of a node while the context lasts."""
    heard: Heard = asyncio.Queue()
    async with await bus.subscribe(subjects.load(node_id), LoadReport, heard.put):
        yield heard


async def first(heard: Heard, is_met: Callable[[LoadReport], bool]) -> LoadReport:
    """The first report that is as wanted; those before it are gone. Raises TimeoutError."""
    async with asyncio.timeout(TIMEOUT_S):
        while not is_met(report := await heard.get()):
            pass
    return report


@dataclass
class LiveNode:
    """A node, and what a gateway, a scheduler and an operator ask of it."""

    bus: Bus
    client: Client
    ref: NodeRef
    heard: Heard

    async def generate(self, prompt_ids: list[int], *, max_tokens: int, epoch: int = 1) -> list[int]:
        """Prefilled and decoded here."""
        return await self.client.generate(self.ref, self.ref, prompt_ids, max_tokens=max_tokens, epoch=epoch)

    async def set_cap(self, cap: int, *, epoch: int = 1, node: NodeRef | None = None) -> None:
        message = SetPrefillCap(
            node=node or self.ref, epoch=epoch, max_prefill_tokens_per_step=cap, reason="the test says so"
        )
        await self._ask(subjects.NODE_CAP, message)

    async def drain(self) -> None:
        await self._ask(subjects.NODE_DRAIN, Drain(reason="new fan"))

    async def cordon(self) -> None:
        await self._ask(subjects.NODE_CORDON, Cordon(reason="odd noise"))

    async def resume(self) -> None:
        await self._ask(subjects.NODE_RESUME, ResumeNode())

    async def wedge(self, for_s: float) -> None:
        await self._ask(subjects.NODE_WEDGE, Wedge(for_s=for_s))

    async def _ask(self, subject: str, message: Message) -> None:
        answer = await self.bus.request(
            subjects.at(subject, self.ref.node_id), message, Accepted, timeout_s=5
        )
        assert answer == Accepted(node_id=self.ref.node_id)

    async def check(self) -> Checked:
        """Its block counts after its own integrity check."""
        return await check(self.bus, self.ref.node_id)

    async def get(self, path: str) -> httpx.Response:
        """From its HTTP port."""
        url = (await self.descriptor()).metrics_url.replace("/metrics", path)
        async with httpx.AsyncClient(timeout=5, trust_env=False, verify=False) as http:
            return await http.get(url)

    async def descriptor(self, cap: int | None = None) -> NodeDescriptor:
        """Its record in the registry, once it says `cap`."""
        found: asyncio.Queue[NodeDescriptor] = asyncio.Queue()

        def look(nodes: dict[str, NodeDescriptor]) -> None:
            record = nodes.get(self.ref.node_id)
            if record is not None and cap in (None, record.max_prefill_tokens_per_step):
                found.put_nowait(record)

        async with running(watch_nodes(self.bus, look)), asyncio.timeout(10):
            return await found.get()


@contextlib.asynccontextmanager
async def one_node(server: NatsServer, model: LoadedModel, **settings: Any) -> AsyncIterator[LiveNode]:
    """The only node, "n0", with a connection of the test's own."""
    async with (
        connect(server.url, name="test") as bus,
        live_node(server, bus, model, "n0", **settings) as ref,
    ):
        async with reports(bus, "n0") as heard, client(bus, model.card.fingerprint) as mine:
            yield LiveNode(bus, mine, ref, heard)


async def check(bus: Bus, node_id: str) -> Checked:
    """The node's block counts after its own integrity check."""
    return await bus.request(subjects.at(subjects.NODE_CHECK, node_id), Check(), Checked, timeout_s=5)


@contextlib.asynccontextmanager
async def client(bus: Bus, fingerprint: str) -> AsyncIterator[Client]:
    """Listens for tokens and keepalives while the context lasts."""
    mine = Client(bus, fingerprint)
    keepalive = Endpoint(subjects.keepalive(mine.gateway_id), Keepalive, mine.keepalive)
    tokens = await bus.subscribe(subjects.tokens(mine.gateway_id), StepTokens, mine.take)
    async with tokens, Service(bus, name="gateway", version="1.0.0", service_id="g", endpoints=[keepalive]):
        yield mine


class Client:
    """A gateway without retries: each request is one attempt on the nodes that the test names."""

    gateway_id = "g"

    def __init__(self, bus: Bus, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._bus = bus
        self._numbers = itertools.count()
        self._outputs: dict[str, Output] = {}

    async def keepalive(self, message: Keepalive) -> KeepaliveReply:
        return KeepaliveReply(unknown=[])

    def take(self, step: StepTokens) -> None:
        for chunk in step.chunks:
            if output := self._outputs.get(chunk.transfer_id):  # else the test has reserved by hand
                output.take(chunk)

    async def generate(
        self,
        prefill: NodeRef,
        decode: NodeRef,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        epoch: int = 1,
        grammar: Grammar | None = None,
    ) -> list[int]:
        """Greedy output, EOS ignored. Raises what a node has failed with, TimeoutError after 20 s."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, grammar=grammar)
        output = await self.answer(prefill, decode, prompt_ids, sampling, epoch=epoch)
        return [output.token_ids[index] for index in sorted(output.token_ids)]

    async def answer(
        self,
        prefill: NodeRef,
        decode: NodeRef,
        prompt_ids: list[int],
        sampling: SamplingParams,
        *,
        epoch: int = 1,
    ) -> Output:
        """The whole output. Raises as `generate`."""
        request_id = f"r{next(self._numbers)}"
        output = self._outputs[transfer_id(request_id, 0)] = Output()
        run = prefill_run(
            prompt_ids,
            request_id=request_id,
            epoch=epoch,
            node=prefill,
            fingerprint=self.fingerprint,
            decode=decode,
            sampling=sampling,
        )
        subject = subjects.at(subjects.PREFILL_RUN, prefill.node_id)
        async with asyncio.timeout(TIMEOUT_S):
            await self._bus.request(subject, run, Accepted, timeout_s=5)
            await output.is_whole.wait()
        if output.error is not None:
            raise output.error
        return output

    async def reserve(
        self, node: NodeRef, num_tokens: int, transfer_id: str = "r.0", token: str = ""
    ) -> Reserved:
        """Room for a handoff, as another node asks for it; with the reservation's `token` it is renewed."""
        request = reserve(
            num_tokens,
            transfer_id=transfer_id,
            node=node,
            fingerprint=self.fingerprint,
            expires_in_s=60.0,
            token=token,
        )
        subject = subjects.at(subjects.DECODE_RESERVE, node.node_id)
        return await self._bus.request(subject, request, Reserved, timeout_s=5)

    async def release(self, node: NodeRef, reserved: Reserved) -> None:
        message = Release(transfer_id=reserved.transfer_id, token=reserved.token)
        subject = subjects.at(subjects.DECODE_RELEASE, node.node_id)
        await self._bus.request(subject, message, Accepted, timeout_s=5)


class Output:
    """Tokens by index: those of two nodes may come in any order."""

    def __init__(self) -> None:
        self.token_ids: dict[int, int] = {}
        self.prompt_logprobs: list[TokenLogprob] = []
        self.num_cached_tokens = 0
        self.error: FlowKVError | None = None
        self.is_whole = asyncio.Event()
        self._num_tokens = math.inf

    def take(self, chunk: TokenChunk) -> None:
        if chunk.error is not None:
            self.error = from_wire(chunk.error)
            self.is_whole.set()
        if chunk.prompt_logprobs:
            assert not self.token_ids
            assert chunk.prompt_index == len(self.prompt_logprobs) + 1
            self.prompt_logprobs += chunk.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        self.token_ids.update(enumerate(chunk.token_ids, chunk.index))
        if chunk.finish_reason:
            self._num_tokens = chunk.index + len(chunk.token_ids)
        if len(self.token_ids) == self._num_tokens:
            self.is_whole.set()
