"""What the bus says of a cluster, for all that show it to people: one listener, whoever draws.

`ClusterView` keeps what was heard, `viewing` feeds it. Nothing is decided here: schedulers have a view of
their own (`flowkv_scheduler/cluster.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec
from nats.aio.msg import Msg

from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, KVTransferred, RequestFinished
from flowkv_common.wire.nodes import (
    REGIMES,
    SILENT_AFTER_PERIODS,
    CapMoved,
    LoadReport,
    NodeDescriptor,
    RegimeChanged,
    ScaleWanted,
    serves_decode,
    serves_prefill,
)

# Of requests, transfers and moves the last ones: a screen shows fewer.
MAX_KEPT = 100
ASK_PERIOD_S = 1.0
# Services that tell some of their state only when they are asked (`$SRV.INFO`), and after how many periods
# they are. There may be many nodes, and their load reports say most.
ASKED_EVERY = {"gateway": 1, "scheduler": 1, "node": 4}
# Two questions in a row without an answer: the process has gone.
GONE_AFTER_QUESTIONS = 3
# Those that reach no other host.
LOCAL_CONNECTORS = ("shm", "cuda_ipc")
EVENTS = RequestFinished | KVTransferred | RegimeChanged | CapMoved | ScaleWanted


class ServiceInfo(msgspec.Struct, frozen=True):
    """A service's answer to `$SRV.INFO` (ADR-32)."""

    name: str
    id: str
    version: str
    metadata: dict[str, str] = {}


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """A node as it can be seen now. `report` is None until this life of it was heard."""

    node_id: str
    # ready; draining; cordoned; silent; unheard: no report yet; or why it is not ready, in its own words
    state: str
    serves: list[str]  # prefill, decode, as its chunk budget is now
    links: dict[str, str]  # peer -> connector; "": none, or which one can't be told
    slower_links: str  # which links could be faster, and why they are not, in the node's words
    heard_s_ago: float | None
    descriptor: NodeDescriptor
    report: LoadReport | None

    def named_link(self, peer: str) -> str:
        """How KV goes to the peer, for people; empty if that can't be told."""
        connector = self.links[peer]
        return f"{connector} with TLS" if connector == "tcp" and self.descriptor.has_data_tls else connector


class ClusterView:
    """What was heard of nodes, services and requests. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._descriptors: dict[str, NodeDescriptor] | None = None  # None: not known yet
        self._nodes_of: dict[tuple[str, int], list[str]] = {}  # (fingerprint, protocol) -> ids of its nodes
        self._reports: dict[str, tuple[float, LoadReport]] = {}
        self._services: dict[tuple[str, str], tuple[float, ServiceInfo]] = {}
        self.regime = ""  # empty: nobody has said
        self.regime_reason = ""
        self.wanted: dict[tuple[str, str], ScaleWanted] = {}  # by model and role; a change of 0 is none
        self.finished: deque[RequestFinished] = deque(maxlen=MAX_KEPT)
        self.transfers: deque[KVTransferred] = deque(maxlen=MAX_KEPT)
        self.moves: deque[CapMoved] = deque(maxlen=MAX_KEPT)
        self.assignments: deque[Assignment] = deque(maxlen=MAX_KEPT)

    # --- what is heard -----------------------------------------------------------------------------

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self._descriptors = dict(descriptors)
        self._nodes_of = {}
        for node_id, descriptor in descriptors.items():
            group = descriptor.model.fingerprint, descriptor.protocol
            self._nodes_of.setdefault(group, []).append(node_id)
        self._reports = {name: heard for name, heard in self._reports.items() if name in descriptors}

    def on_report(self, report: LoadReport) -> None:
        self._reports[report.node.node_id] = self._clock(), report

    def on_assignment(self, assignment: Assignment) -> None:
        self.assignments.append(assignment)

    def on_event(self, event: EVENTS) -> None:
        match event:
            case RequestFinished():
                self.finished.append(event)
            case KVTransferred():
                self.transfers.append(event)
            case CapMoved():
                self.moves.append(event)
            case RegimeChanged():
                # Of several models the worst counts: the leader says within a second which one that is.
                is_worse = not self.regime or REGIMES.index(event.after) > REGIMES.index(self.regime)
                if is_worse or len(self.models) < 2:
                    self.regime, self.regime_reason = event.after, event.reason
            case ScaleWanted():
                self.wanted[event.model, event.role] = event

    def on_service(self, info: ServiceInfo) -> None:
        self._services[info.name, info.id] = self._clock(), info
        if "regime" in info.metadata:  # of a scheduler that leads
            self.regime, self.regime_reason = info.metadata["regime"], info.metadata["regime_reason"]

    # --- what is to be seen ------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether the nodes are known, each was heard, and a gateway and a leader have answered."""
        return (
            self._descriptors is not None
            and all(node.report for node in self.nodes())
            and self.leader is not None
            and bool(self.services("gateway"))
        )

    def services(self, name: str) -> list[ServiceInfo]:
        """The gateways, schedulers or nodes that have answered lately, by id."""
        since = self._clock() - GONE_AFTER_QUESTIONS * ASKED_EVERY[name] * ASK_PERIOD_S
        fresh = (info for at, info in self._services.values() if info.name == name and at > since)
        return sorted(fresh, key=lambda info: info.id)

    @property
    def models(self) -> list[str]:
        """The names of all models that have nodes."""
        return sorted({node.model.name for node in (self._descriptors or {}).values()})

    def wishes(self) -> list[str]:
        """Nodes that are wanted or could be spared, each in a line for people."""
        return [
            f"{one.change:+d} {one.role}{f' of {one.model}' if len(self.models) > 1 else ''}: {one.reason}"
            for one in self.wanted.values()
            if one.change
        ]

    @property
    def leader(self) -> ServiceInfo | None:
        leaders = (info for info in self.services("scheduler") if info.metadata.get("state") == "leader")
        return next(leaders, None)

    def nodes(self) -> list[NodeState]:
        """Prefill nodes first, as they were started; then by id."""
        order = {"prefill": 0, "mixed": 1}
        infos = {info.id: info for info in self.services("node")}
        states = [self._state_of(node, infos) for node in (self._descriptors or {}).values()]
        return sorted(states, key=lambda one: (order.get(one.descriptor.role, 2), one.node_id))

    def pairs(self) -> list[tuple[str, str]]:
        """Ready nodes that could serve a request together: one prefills, the other, or the same, decodes."""

        def group(node: NodeState) -> tuple[object, ...]:
            what = node.descriptor
            return what.model.fingerprint, what.layout, what.memory, what.protocol

        ready = [node for node in self.nodes() if node.state == "ready"]
        return [
            (prefill.node_id, decode.node_id)
            for prefill in ready
            for decode in ready
            if "prefill" in prefill.serves and "decode" in decode.serves and group(prefill) == group(decode)
        ]

    def _state_of(self, descriptor: NodeDescriptor, infos: Mapping[str, ServiceInfo]) -> NodeState:
        node_id = descriptor.node.node_id
        heard_at, report = self._reports.get(node_id, (0.0, None))
        if report is not None and report.node != descriptor.node:
            report = None
        heard_s_ago = self._clock() - heard_at if report else None
        info = infos[node_id].metadata if node_id in infos else {}
        budget = (report or descriptor).max_prefill_tokens_per_step
        sides = {
            "prefill": serves_prefill(budget, descriptor.layout.block_size),
            "decode": serves_decode(budget, descriptor.token_budget),
        }
        return NodeState(
            node_id=node_id,
            state=_state(report, heard_s_ago, info.get("state", "")),
            serves=[side for side, does in sides.items() if does],
            links=self._links_of(descriptor, report),
            slower_links=info.get("slower_links", ""),
            heard_s_ago=heard_s_ago,
            descriptor=descriptor,
            report=report,
        )

    def _links_of(self, descriptor: NodeDescriptor, report: LoadReport | None) -> dict[str, str]:
        """A report names the links by another connector than most, and says how many there are in all."""
        if report is None:
            return {}
        mine = self._nodes_of[descriptor.model.fingerprint, descriptor.protocol]
        has_all = report.num_links >= len(mine) - 1
        links = dict.fromkeys(mine, report.usual_connector if has_all else "")
        del links[descriptor.node.node_id]
        links.update({peer: connector for peer, connector in report.links.items() if peer in links})
        return links


def best_connector(sender: NodeDescriptor, receiver: NodeDescriptor) -> str:
    """The first of the sender's by which it could reach the receiver; empty if there is none."""
    is_far = are_on_two_hosts(sender, receiver)
    both = (name for name in sender.connectors if name in receiver.connectors)
    return next((name for name in both if not (is_far and name in LOCAL_CONNECTORS)), "")


def could_be_faster(node: NodeState, nodes: Mapping[str, NodeState]) -> bool:
    """Whether one of its links could be: a node does not know which of its peers are on its host."""
    return any(
        connector != best_connector(node.descriptor, nodes[peer].descriptor)
        for peer, connector in node.links.items()
    )


def are_on_two_hosts(one: NodeDescriptor, other: NodeDescriptor) -> bool:
    """By their kernels, since each container has a name of its own. False if one does not tell its own."""
    return one.boot_id != other.boot_id and "" not in (one.boot_id, other.boot_id)


def _state(report: LoadReport | None, heard_s_ago: float | None, own_word: str) -> str:
    if report is None or heard_s_ago is None:
        return "unheard"
    if heard_s_ago > SILENT_AFTER_PERIODS * report.period_s:
        return "silent"
    if report.draining:
        return "draining"
    if report.is_cordoned:
        return "cordoned"
    if not report.ready:
        return own_word if own_word not in ("", "ready") else "not ready"
    return "ready"


@contextlib.asynccontextmanager
async def viewing(bus: Bus) -> AsyncIterator[ClusterView]:
    """A view that follows the cluster while the context lasts.

    What its user may not hear stays empty: in Compose only the operator hears all. Raises `Unavailable`.
    """
    view = ClusterView()
    async with (
        await bus.subscribe(subjects.LOAD_ALL, LoadReport, view.on_report, on_bad=_ignore),
        running(watch_nodes(bus, view.on_nodes)),
        hearing_events(bus, view),
    ):
        yield view


@contextlib.asynccontextmanager
async def hearing_events(bus: Bus, view: ClusterView) -> AsyncIterator[None]:
    """Feeds `view` all but nodes and their reports, which some hear anyway. Raises `Unavailable`."""

    async def take_event(msg: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # of another version
            view.on_event(msgspec.json.decode(msg.data, type=EVENTS))

    async with (
        await bus.subscribe(subjects.assignment("*"), Assignment, view.on_assignment, on_bad=_ignore),
        await bus.subscribe_raw(subjects.event("*", ">"), take_event),
        running(_ask_services(bus, view)),
    ):
        yield


async def until_complete(view: ClusterView, patience_s: float = 2.0) -> None:
    """Until all that runs has been heard, or `patience_s` is over: what is dead or missing never is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while not view.is_complete:  # noqa: ASYNC110 (what comes last has no event)
                await asyncio.sleep(0.02)


def _ignore(subject: str, what: str) -> None:
    """Of another version, perhaps: who only looks need not complain."""


async def _ask_services(bus: Bus, view: ClusterView) -> None:
    names = {subjects.service_in_namespace(name, bus.namespace): name for name in ASKED_EVERY}

    async def take(msg: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            info = msgspec.json.decode(msg.data, type=ServiceInfo)
            if info.name in names:
                view.on_service(msgspec.structs.replace(info, name=names[info.name]))

    inbox = bus.nc.new_inbox()
    async with await bus.subscribe_raw(inbox, take):
        for number in itertools.count():
            for asked, name in names.items():
                if bus.is_connected and number % ASKED_EVERY[name] == 0:
                    await bus.nc.publish(f"$SRV.INFO.{asked}", b"", reply=inbox)
            await asyncio.sleep(ASK_PERIOD_S)
