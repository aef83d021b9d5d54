"""Puts the token chunks of one attempt in order. Pure: knows neither NATS nor time."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
from nats.aio.msg import Msg

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.hashing import block_hashes
from flowkv_common.wire.messages import (
    Keepalive,
    KeepaliveReply,
    ModelCard,
    ModelFiles,
    ReadyReply,
    ReadyRequest,
    StepTokens,
    TokenChunk,
)
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    serves_decode,
    serves_prefill,
)


class Reorder:
    """Gives chunks out in order of their index, each token once, whatever arrives late or twice.

    `has_gap` says that something is held back for tokens that have not come: ask for a resume from
    `expected`.
    """

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected  # index of the next token
        self._held: list[TokenChunk] = []  # by index, all beyond `expected`
        self._has_ended = False

    @property
    def has_gap(self) -> bool:
        return bool(self._held)

    def push(self, chunk: TokenChunk) -> list[TokenChunk]:
        """Take a chunk; returns those that are due, without tokens that were given out before.

        One with a finish reason or an error comes last, and only when every token before it was given out.
        """
        if self._has_ended or chunk in self._held:
            return []
        bisect.insort(self._held, chunk, key=_place)
        due = []
        while self._held and self._held[0].index <= self.expected:
            rest = _without_first(self._held.pop(0), self.expected)
            if not (rest.token_ids or _is_last(rest)):
                continue
            due.append(rest)
            self.expected += len(rest.token_ids)
            if _is_last(rest):
                self._has_ended = True
                self._held.clear()
        return due


def _place(chunk: TokenChunk) -> tuple[int, bool]:
    return chunk.index, _is_last(chunk)


def _is_last(chunk: TokenChunk) -> bool:
    return chunk.finish_reason is not None or chunk.error is not None


def _without_first(chunk: TokenChunk, expected: int) -> TokenChunk:
    """`chunk` from token `expected` on."""
    num_known = expected - chunk.index
    if num_known == 0:
        return chunk
    return msgspec.structs.replace(
        chunk, index=expected, token_ids=chunk.token_ids[num_known:], logprobs=chunk.logprobs[num_known:]
    )


# Of a longer prompt the beginning will do.
MAX_HASHES = 16_384
# So many take a few milliseconds; the event loop must not stand still for more.
MAX_HASHES_IN_LOOP = 1000


class HashBasis(NamedTuple):
    """What equal tokens must have in common to have equal hashes."""

    fingerprint: str
    block_size: int


class PromptHashes:
    """Of one request, whose tokens only grow: no block is hashed twice."""

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        """`max_hashes` is what one message can carry; never more than `MAX_HASHES`."""
        self._max_hashes = min(max_hashes, MAX_HASHES)
        self._basis: HashBasis | None = None
        self._hashes: list[str] = []

    async def of(self, token_ids: Sequence[int], basis: HashBasis) -> list[str]:
        """One hash for each full block, of the first so many."""
        known = self._hashes if basis == self._basis else []
        num_blocks = min(len(token_ids) // basis.block_size, self._max_hashes)
        if num_blocks > len(known):
            hashed = token_ids[: num_blocks * basis.block_size]
            known = await self._extended(known, hashed, basis, num_blocks - len(known))
        self._basis, self._hashes = basis, known
        return known

    async def _extended(
        self, known: list[str], token_ids: Sequence[int], basis: HashBasis, num_new: int
    ) -> list[str]:
        wanted = basis.fingerprint, token_ids, basis.block_size, known
        if num_new <= MAX_HASHES_IN_LOOP:
            return block_hashes(*wanted)
        return await asyncio.to_thread(block_hashes, *wanted)


class OwnModel(msgspec.Struct, frozen=True):
    """The files in the gateway's folder, and the name that clients shall use: empty if the nodes' name."""

    files: ModelFiles
    name: str = ""

    def why_not(self, card: ModelCard) -> str | None:
        """Why nodes with this card serve another model; None if they serve ours.

        The tokenizer must be the same. Then the weights decide, where both sides have them. Else the rest of
        what is known must agree: config and name.
        """
        if _differ(self.files.tokenizer, card.files.tokenizer):
            return "its tokenizer.json is another"
        if self.files.weights and card.files.weights:
            return "its weights are others" if self.files.weights != card.files.weights else None
        if _differ(self.files.config, card.files.config):
            return "its config.json is another"
        if self.name and self.name != card.name:
            return f"it is not called {self.name!r}, and there are no weights here to compare"
        return None


def _differ(ours: str, theirs: str) -> bool:
    """Of two digests, of which either may be unknown."""
    return bool(ours and theirs) and ours != theirs


log = logging.getLogger(__name__)


class Cluster:
    """Fed by the registry and by load reports; chooses nothing but the fingerprint."""

    def __init__(self, own: OwnModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._clock = clock
        self._by_fingerprint: dict[str, dict[str, NodeDescriptor]] = {}
        self._reports: dict[str, tuple[float, LoadReport]] = {}
        self._model: ModelCard | None = None
        self._others: dict[str, str] = {}  # node id -> why it is none of ours

    def follow(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed. The model outlives its nodes: clients may ask for it at any time."""
        self._reports = {name: heard for name, heard in self._reports.items() if name in descriptors}
        self._by_fingerprint = {}
        others = {}
        for node_id, node in descriptors.items():
            if reason := self._own.why_not(node.model):
                others[node_id] = reason
                if node_id not in self._others:
                    log.warning("%s serves another model, %s: %s", node_id, node.model.name, reason)
            else:
                self._by_fingerprint.setdefault(node.model.fingerprint, {})[node_id] = node
        self._others = others
        self._choose_model()

    def hear(self, report: LoadReport) -> None:
        """The latest word of a node."""
        _, before = self._reports.get(report.node.node_id, (0.0, None))
        self._reports[report.node.node_id] = (self._clock(), report)
        if before is None or _standing(before) != _standing(report):
            self._choose_model()

    def model(self) -> ModelCard | None:
        """Of new requests; None until a node of ours has joined."""
        return self._model

    def hash_basis(self, fingerprint: str) -> HashBasis | None:
        """How the nodes of a fingerprint hash their blocks, most of them; None while there are none."""
        nodes = self._by_fingerprint.get(fingerprint)
        if not nodes:
            return None
        [(block_size, _)] = Counter(node.layout.block_size for node in nodes.values()).most_common(1)
        return HashBasis(fingerprint, block_size)

    def has_ready_node(self) -> bool:
        """Which of them can work together is known to the scheduler."""
        return self._model is not None and self._num_of_sides(self._model.fingerprint)[1] > 0

    def kv_cache_usage(self) -> float:
        """The share of blocks in use, 0 to 1, over all nodes of the model that report; 0 if none does."""
        nodes = self._by_fingerprint.get(self._model.fingerprint, {}) if self._model else {}
        blocks = [report.blocks for _, report in self._fresh(nodes)]
        used = sum(one.leased + one.quarantined for one in blocks)
        return used / max(1, sum(one.total for one in blocks))

    def _fresh(self, nodes: Mapping[str, NodeDescriptor]) -> Iterator[tuple[NodeDescriptor, LoadReport]]:
        """The nodes that have reported lately, in this life, with their reports."""
        now = self._clock()
        for node_id, node in nodes.items():
            heard_at, report = self._reports.get(node_id, (0.0, None))
            if report is None or report.node != node.node:
                continue
            if now - heard_at < SILENT_AFTER_PERIODS * report.period_s:
                yield node, report

    def _choose_model(self) -> None:
        """The weights that were served while any node has them; then most pairs, then most nodes."""
        if not self._by_fingerprint:
            return
        current = self._model

        def rank(fingerprint: str) -> tuple[bool, tuple[int, int], bool, str]:
            card = next(iter(self._by_fingerprint[fingerprint].values())).model
            nums = self._num_of_sides(fingerprint)
            # Where there are no weights here, others' may fit this gateway: they must not push ours aside.
            stays = current is not None and nums[1] > 0 and card.files.weights == current.files.weights
            return stays, nums, current is not None and fingerprint == current.fingerprint, fingerprint

        best = max(self._by_fingerprint, key=rank)
        self._model = _servable(list(self._by_fingerprint[best].values()))
        if current is None or best != current.fingerprint:
            log.info("served by the nodes of %s, fingerprint %s", self._model.name, best)

    def _num_of_sides(self, fingerprint: str) -> tuple[int, int]:
        """How many are ready: on the smaller side, and on both. A mixed node stands on each side."""
        num_prefill = num_decode = 0
        for node, report in self._fresh(self._by_fingerprint.get(fingerprint, {})):
            if not report.ready:
                continue
            num_prefill += serves_prefill(report.max_prefill_tokens_per_step, node.layout.block_size)
            num_decode += serves_decode(report.max_prefill_tokens_per_step, node.token_budget)
        return min(num_prefill, num_decode), num_prefill + num_decode


def _standing(report: LoadReport) -> tuple[str, bool, int]:
    """What of a report decides whether, and on which side, its node counts."""
    return report.node.incarnation, report.ready, report.max_prefill_tokens_per_step


def _servable(nodes: Sequence[NodeDescriptor]) -> ModelCard:
    """The model, its context no longer than the largest KV cache: the scheduler refuses what is.

    It is called as most of its nodes say.
    """
    [(name, _)] = Counter(sorted(node.model.name for node in nodes)).most_common(1)
    largest = max(node.num_blocks * node.layout.block_size for node in nodes)
    model = nodes[-1].model
    return msgspec.structs.replace(model, name=name, max_model_len=min(model.max_model_len, largest))


# Decode only keeps room for the attempt: it is prefill that must show signs of life.
RESERVED = "reserved"
# A node has the attempt, and does not work at it.
WAITING = ("queued", "preempted")


class AttemptStream:
    """The chunks of one attempt, in order. `heard_at` is the last sign of life, token or keepalive.

    `is_running` while a node works at it, as far as its keepalives tell: they come once a second.
    """

    def __init__(self, from_index: int) -> None:
        self.heard_at = time.monotonic()
        self.gap_since: float | None = None
        self.failed_at: str | None = None  # the node that sent an error
        self.is_running = False
        self._reorder = Reorder(from_index)
        self._due: deque[TokenChunk] = deque()
        self._news = asyncio.Event()

    @property
    def expected(self) -> int:
        """Index of the next token that is missing here."""
        return self._reorder.expected

    def push(self, chunk: TokenChunk, node_id: str) -> None:
        """Take a chunk that `node_id` has sent."""
        self.heard_at = time.monotonic()
        self.is_running = True
        if chunk.error is not None:
            self.failed_at = node_id
        self._due.extend(self._reorder.push(chunk))
        if not self._reorder.has_gap:
            self.gap_since = None
        elif self.gap_since is None:
            self.gap_since = self.heard_at
        self._news.set()

    async def next(self, timeout_s: float) -> TokenChunk | None:
        """The next chunk in order, or None after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._due:
                    self._news.clear()
                    await self._news.wait()
        return self._due.popleft() if self._due else None


class Streams:
    """All attempts of this gateway that wait for tokens."""

    def __init__(self) -> None:
        self._streams: dict[str, AttemptStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def num_running(self) -> int:
        return sum(stream.is_running for stream in self._streams.values())

    @contextlib.contextmanager
    def open(self, transfer_id: str, from_index: int) -> Iterator[AttemptStream]:
        """Collect the tokens of an attempt while the context lasts; later ones are dropped."""
        stream = self._streams[transfer_id] = AttemptStream(from_index)
        try:
            yield stream
        finally:
            del self._streams[transfer_id]

    def take(self, step: StepTokens, _: Msg) -> None:
        for chunk in step.chunks:
            if stream := self._streams.get(chunk.transfer_id):
                stream.push(chunk, step.node_id)

    async def keepalive(self, message: Keepalive) -> KeepaliveReply:
        now = time.monotonic()
        unknown = []
        for transfer_id, state in message.states.items():
            stream = self._streams.get(transfer_id)
            if stream is None:
                unknown.append(transfer_id)
            elif state != RESERVED:
                stream.heard_at = now
                stream.is_running = state not in WAITING
        return KeepaliveReply(unknown=unknown)


ASK_PERIOD_S = 0.5
ASK_TIMEOUT_S = 1.0
# A scheduler that dies has a successor within 2.5 s, where one stands by, and requests wait for so long.
SCHEDULER_SILENT_S = 3.0

_NO_NODE = "no node of the model is ready"


class Readiness:
    """Fed by `keep_asking`. `clock` gives monotonic seconds."""

    def __init__(self, bus: Bus, cluster: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._cluster = cluster
        self._clock = clock
        self._answered_at = -math.inf
        self._why_not: str | None = None  # in the scheduler's last answer

    def why_not(self) -> str | None:
        """All that is missing, None if nothing is."""
        if not self._bus.is_connected:
            return "not connected to NATS"
        if self._clock() - self._answered_at > SCHEDULER_SILENT_S:
            missing = ["no scheduler answers"]
        else:
            missing = [self._why_not] if self._why_not else []
        if not self._cluster.has_ready_node() and _NO_NODE not in missing:
            missing.append(_NO_NODE)
        return "; ".join(missing) or None

    async def keep_asking(self) -> None:
        """Until cancelled."""
        while True:
            model = self._cluster.model()
            request = ReadyRequest(fingerprint=model.fingerprint if model else "")
            try:
                reply = await self._bus.request(
                    subjects.SCHEDULER_READY, request, ReadyReply, timeout_s=ASK_TIMEOUT_S
                )
                self._answered_at, self._why_not = self._clock(), reply.why_not
            except FlowKVError:
                pass  # what counts is the last answer
            await asyncio.sleep(ASK_PERIOD_S)
