"""What the scheduler knows of the nodes: what they are, how loaded they are, and what it gave them since.

Pure: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from operator import attrgetter

import msgspec
from sortedcontainers import SortedDict

from flowkv_common.wire.messages import NodeRef, NodesSeen, ScheduleRequest
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
)
from flowkv_scheduler.belief import TRUSTED, Belief, Doubt
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.node_view import (
    Group,
    NodeLife,
    NodeView,
    Speed,
    Work,
    group_of,
    speed_of,
    view_of,
)
from flowkv_scheduler.prefixes import PrefixIndex
from flowkv_scheduler.slices import Sliced

# Prompts are taken to be so long at first, and the newest one has this weight in the mean.
FIRST_MEAN_PROMPT_TOKENS = 512.0
NEWEST_PROMPT_WEIGHT = 0.05
# The longest wait in TTFT targets, where no other is set. Who misses the target waits in nobody's way.
WAIT_FACTOR = 12.0
# Load reports lag: what we gave a node counts on top of its report for so long, unless one shows it sooner.
CHOICES_COUNT_FOR_PERIODS = 2.0
# The report of a silent node is dropped after this.
FORGET_REPORT_AFTER_S = 60.0
# What a node measures together: fields of `Speed`.
STEP_COSTS = "base_s", "chunk_base_s"
PROMPT_COSTS = "prefill_token_s", "attended_token_s"
SEQUENCE_COSTS = "sequence_s", "context_token_s"
# So many views of nodes are made in some 0.3 ms: asks wait for that.
VIEWS_PER_SLICE = 10


class Goals(msgspec.Struct, frozen=True):
    """Targets in seconds: time to first token, time between tokens, and the longest wait that is admitted."""

    ttft_s: float = 5.0
    itl_s: float = 0.25
    max_wait_s: float = 0.0

    @property
    def longest_wait_s(self) -> float:
        """`max_wait_s`; if that is 0, it follows from the TTFT target."""
        return self.max_wait_s or self.late_wait_s

    @property
    def late_wait_s(self) -> float:
        """So long after it has come a late prompt is due before newcomers, at its node."""
        return WAIT_FACTOR * self.ttft_s

    def of_request(self, request: ScheduleRequest) -> Goals:
        """With its own. Of ITL goals the stricter counts: the batch that it joins has others too."""
        if not (request.ttft_goal_s or request.itl_goal_s):
            return self
        return Goals(
            ttft_s=request.ttft_goal_s or self.ttft_s,
            itl_s=min(request.itl_goal_s or self.itl_s, self.itl_s),
            max_wait_s=self.max_wait_s,
        )


class NodeGroup:
    """Nodes that can exchange blocks: all of them, and each side, the soonest of each speed class first."""

    def __init__(self) -> None:
        self.members: SortedDict = SortedDict()  # `id_rank` -> node
        self.prefill: SortedDict = SortedDict()  # `prefill_rank` -> node
        self.decode: SortedDict = SortedDict()  # `decode_rank` -> node
        self.roomiest: SortedDict = SortedDict()  # `room_rank` -> node: those with a place
        self.prompt_tokens_per_s = 0.0  # of the prefill side together
        self.num_free_places = 0  # in the batches of the decode side

    def replace_node(self, before: NodeView | None, after: NodeView | None) -> None:
        """One view of a node by the next; None if it was not here, or leaves."""
        for nodes, rank in (
            (self.members, id_rank),
            (self.prefill, prefill_rank),
            (self.decode, decode_rank),
            (self.roomiest, room_rank),
        ):
            old = None if before is None else rank(before)
            new = None if after is None else rank(after)
            if old is not None and old != new:
                del nodes[old]
            if new is not None:
                nodes[new] = after
        for node, sign in ((before, -1), (after, 1)):
            if node is not None and node.may_prefill:
                self.prompt_tokens_per_s += sign / node.speed.prefill_token_s
            if node is not None and node.room_rank is not None:
                self.num_free_places += sign * node.num_free_places


id_rank = attrgetter("id_rank")
prefill_rank = attrgetter("prefill_rank")
decode_rank = attrgetter("decode_rank")
room_rank = attrgetter("room_rank")


class ClusterState:
    """Joins descriptors and reports by node *and* incarnation: a former life never passes for the present."""

    def __init__(self) -> None:
        self.prefixes = PrefixIndex()
        self.belief = Belief()
        self.mean_prompt_tokens = FIRST_MEAN_PROMPT_TOKENS  # of a model whose prompts are not known yet
        self._mean_prompt_tokens: dict[str, float] = {}  # by model
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._nodes: dict[NodeRef, NodeLife] = {}
        self._views: dict[str, NodeView] = {}
        self._groups: SortedDict = SortedDict(repr)  # group -> `NodeGroup`
        self._leaving: dict[str, str] = {}
        self.doubted: Set[NodeRef] = frozenset()  # nodes that don't do what they say
        self._if_tried: dict[NodeRef, Doubt] = {}  # whom to doubt as soon as it has work
        self._tried: set[NodeRef] = set()  # since the last `doubt_nodes`
        self.lengths: defaultdict[str, OutputLengths] = defaultdict(OutputLengths)
        # By model and what was measured: the speed of the node that has done so last.
        self._measured: defaultdict[str, dict[tuple[str, str], Speed]] = defaultdict(dict)

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """All nodes of the registry, by id."""
        before, self._descriptors = self._descriptors, dict(descriptors)
        models = {descriptor.model.fingerprint for descriptor in descriptors.values()}
        for model in self._measured.keys() - models:
            del self._measured[model]
        for model in self._mean_prompt_tokens.keys() - models:
            del self._mean_prompt_tokens[model]
        for node_id in before.keys() | descriptors.keys():
            if before.get(node_id) != descriptors.get(node_id):
                if node_id in before and (known := self._nodes.get(before[node_id].node)):
                    self._learn_lengths(known)
                self._refresh(node_id)
        for model in self.lengths.keys() - models:
            del self.lengths[model]

    def add_report(self, report: LoadReport, now: float) -> None:
        """Take a report; the latest of a life wins, an older one that was overtaken is dropped."""
        known = self._nodes.get(report.node)
        if known is None:
            self._nodes[report.node] = NodeLife(report, self._speed_of(report), now)
            self._forget_silent(now)
        elif report.seq >= known.report.seq:
            known.hear(report, self._speed_of(report), now)
        self._learn_lengths(self._nodes[report.node])
        self._refresh(report.node.node_id)

    def add_prompt(self, node: NodeRef, work: Work, now: float) -> None:
        """Count a prompt that we gave a node, until its report shows it or two periods have passed."""
        if known := self._nodes.get(node):
            until = now + CHOICES_COUNT_FOR_PERIODS * known.report.period_s
            known.prompts.add_choice(until, work)
            self._try(node, known)
            self._refresh(node.node_id)

    def add_sequence(self, node: NodeRef, work: Work, arrives_in_s: float, now: float) -> None:
        """Count a sequence that will come to a node in `arrives_in_s`, until two periods after that.

        Its blocks only until a report shows that it has its room: that is when its prompt begins.
        """
        if known := self._nodes.get(node):
            until = now + arrives_in_s + CHOICES_COUNT_FOR_PERIODS * known.report.period_s
            known.rooms.add_choice(until, Work(num_blocks=work.num_blocks))
            known.sequences.add_choice(until, msgspec.structs.replace(work, num_blocks=0))
            self._try(node, known)
            self._refresh(node.node_id)

    def mean_prompt_tokens_of(self, fingerprint: str) -> float:
        """The mean length of a model's prompts lately."""
        return self._mean_prompt_tokens.get(fingerprint, self.mean_prompt_tokens)

    def learn_prompt_length(self, fingerprint: str, num_tokens: int) -> None:
        """The mean length of prompts tells what a queue of so many tokens costs."""
        mean = self.mean_prompt_tokens_of(fingerprint)
        self._mean_prompt_tokens[fingerprint] = mean + NEWEST_PROMPT_WEIGHT * (num_tokens - mean)

    def set_leaving(self, leaving: Mapping[str, str]) -> None:
        """Which side each of these nodes gets nothing new on, by id."""
        before, self._leaving = self._leaving, dict(leaving)
        for node_id in before.keys() | leaving.keys():
            if before.get(node_id) != leaving.get(node_id):
                self._refresh(node_id)

    def add_seen(self, seen: NodesSeen, now: float) -> None:
        """What a gateway saw of nodes counts from the next `doubt_nodes` on."""
        for one in seen.nodes:
            view = self._views.get(one.node.node_id)
            if view is not None and view.descriptor.node == one.node:
                self.belief.hear(seen.gateway_id, one, view.own_step_s, now)

    def doubt_nodes(self, now: float) -> Sliced[None]:
        """Believe each node by what it has done, as against the best of its side."""
        self.belief.forget_old(now)
        doubts: dict[NodeRef, Doubt] = {}
        if_tried: dict[NodeRef, Doubt] = {}
        self.doubted, self._tried = self.doubted | self._tried, set()
        if self.belief:
            for group in list(self._groups.values()):
                members, prefill, decode = (
                    [node.descriptor.node for node in nodes.values()]
                    for nodes in (group.members, group.prefill, group.decode)
                )
                yield
                views = [(node.descriptor.node, node) for node in group.members.values()]
                doubts |= yield from self.belief.doubts(
                    members,
                    prefill,
                    decode,
                    now,
                    with_prompts={ref for ref, node in views if node.num_queued_tokens},
                    with_sequences={ref for ref, node in views if node.num_sequences},
                )
                everyone = set(members)
                if_tried |= yield from self.belief.doubts(
                    members, prefill, decode, now, with_prompts=everyone, with_sequences=everyone
                )
        # All of them until the last is through: a tick may be cancelled.
        self.doubted = doubts.keys() | self.doubted
        self._if_tried = if_tried
        num_changed = 0
        for ref in self.doubted:
            doubt = doubts.get(ref, TRUSTED)
            known = self._nodes.get(ref)
            if known is not None and known.doubt != doubt:
                known.doubt = doubt
                self._refresh(ref.node_id)
                num_changed += 1
                if num_changed % VIEWS_PER_SLICE == 0:
                    yield
        self.doubted = doubts.keys()

    def _try(self, ref: NodeRef, node: NodeLife) -> None:
        """It gets work. One that was slow gets no more of it before it has shown what it does."""
        if doubt := self._if_tried.get(ref):
            node.doubt = doubt
            self._tried.add(ref)

    def touch_all(self, now: float) -> None:
        """Start all ages anew: after a reconnect the silence was ours, not the nodes'."""
        for ref, known in self._nodes.items():
            known.heard_at = now
            self._refresh(ref.node_id)

    def views(self) -> list[NodeView]:
        """The nodes that have both told what they are and reported, by id."""
        return [view for _, view in sorted(self._views.items())]

    def descriptor_of(self, ref: NodeRef) -> NodeDescriptor | None:
        """None while the registry does not have this incarnation of the node."""
        descriptor = self._descriptors.get(ref.node_id)
        return descriptor if descriptor is not None and descriptor.node == ref else None

    def view(self, node_id: str) -> NodeView | None:
        return self._views.get(node_id)

    def usable(self, now: float) -> Iterator[NodeView]:
        return (view for view in self._views.values() if view.is_usable(now))

    def groups_of(self, fingerprint: str) -> list[NodeGroup]:
        """The nodes of a model."""
        return [nodes for group, nodes in self._groups.items() if group.fingerprint == fingerprint]

    def _speed_of(self, report: LoadReport) -> Speed:
        """What a node has not measured yet is taken to cost what it does on another node of its model."""
        speed, descriptor, fit = speed_of(report), self._descriptors.get(report.node.node_id), report.step
        if descriptor is None:
            return speed
        measured, guessed = self._measured[descriptor.model.fingerprint], dict[str, float]()
        for costs, is_measured, has_rate in (
            (STEP_COSTS, fit and fit.base_s, report.decode_step_s),
            (PROMPT_COSTS, fit and fit.prefill_token_s, report.prefill_tokens_per_s),
            (SEQUENCE_COSTS, fit and fit.sequence_s + fit.context_token_s, 0.0),
        ):
            if is_measured:
                measured[costs] = speed
            elif not has_rate and (other := measured.get(costs)):
                guessed |= {name: getattr(other, name) for name in costs}
        return msgspec.structs.replace(speed, **guessed) if guessed else speed

    def lengths_of(self, fingerprint: str) -> OutputLengths:
        """How long outputs of a model become."""
        return self.lengths.get(fingerprint) or OutputLengths()

    def _learn_lengths(self, node: NodeLife, *, leaves: bool = False) -> None:
        """Put the node's newest forecast in the place of the one before; none if it leaves, or has left."""
        ref = node.report.node
        descriptor = self._descriptors.get(ref.node_id)
        if node.counted is not None:
            model, before = node.counted
            self.lengths[model].replace_forecast(before, None)
            node.counted = None
        forecast = None if leaves else node.report.forecast
        if descriptor is not None and descriptor.node == ref and forecast is not None:
            node.counted = descriptor.model.fingerprint, forecast
            self.lengths[descriptor.model.fingerprint].replace_forecast(None, forecast)

    def _refresh(self, node_id: str) -> None:
        """Compute the node's view anew."""
        descriptor, before = self._descriptors.get(node_id), self._views.get(node_id)
        known = self._nodes.get(descriptor.node) if descriptor else None
        view = None
        if descriptor is not None and known is not None:
            mean_prompt_tokens = self.mean_prompt_tokens_of(descriptor.model.fingerprint)
            view = view_of(descriptor, known, mean_prompt_tokens, self._leaving.get(node_id))
        if before is not None and (view is None or view.group != before.group):
            self._groups[before.group].replace_node(before, None)
            if not self._groups[before.group].members:
                del self._groups[before.group]
            before = None
        if view is None:
            self._views.pop(node_id, None)
            return
        self._views[node_id] = view
        group = self._groups.get(view.group)
        if group is None:
            group = self._groups[view.group] = NodeGroup()
        group.replace_node(before, view)

    def _forget_silent(self, now: float) -> None:
        """Drop lives that ended long ago; called when a new one begins, so memory stays bounded."""
        for ref, known in list(self._nodes.items()):
            silent_s = SILENT_AFTER_PERIODS * known.report.period_s
            if now - known.heard_at > max(FORGET_REPORT_AFTER_S, silent_s):
                self._learn_lengths(known, leaves=True)
                del self._nodes[ref]
                self._refresh(ref.node_id)


def num_pairs(nodes: Iterable[NodeView]) -> int:
    """Of a node that prefills and one that decodes, which can exchange blocks or are the same node."""
    prefill, decode = Counter[Group](), Counter[Group]()
    for node in nodes:
        prefill[node.group] += node.may_prefill
        decode[node.group] += node.may_decode
    return sum(count * decode[group] for group, count in prefill.items())


def why_apart(nodes: Iterable[NodeDescriptor]) -> str | None:
    """Which nodes can't exchange blocks with most nodes of their model, and what differs; None if all can.

    Here a model is what has one name: nodes of other names are not meant to work together.
    """
    by_name: dict[str, list[NodeDescriptor]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: node.node.node_id):
        by_name[node.model.name].append(node)
    return "; ".join(filter(None, map(_why_apart, by_name.values()))) or None


def _why_apart(nodes: Iterable[NodeDescriptor]) -> str:
    groups: dict[Group, list[str]] = defaultdict(list)
    for node in nodes:
        groups[group_of(node)].append(node.node.node_id)
    most = max(groups, key=lambda group: len(groups[group]))  # of equals, that with the first node
    lines = []
    for group, names in groups.items():
        differences = [
            f"{name} {mine}, not {theirs}"
            for (name, mine), theirs in zip(_parts(group).items(), _parts(most).values(), strict=True)
            if mine != theirs
        ]
        if differences:
            lines.append(
                f"{', '.join(names)} can't exchange KV with {', '.join(groups[most])}: "
                f"{', '.join(differences)}"
            )
    return "; ".join(lines)


def _parts(group: Group) -> dict[str, str | int]:
    """By the names that an operator knows."""
    layout = group.layout
    return {
        "model fingerprint": group.fingerprint,
        "num layers": layout.num_layers,
        "block size": layout.block_size,
        "num kv heads": layout.num_kv_heads,
        "head dim": layout.head_dim,
        "KV by layer": str([tuple(layer) for layer in layout.layers] or "alike"),
        "KV dtype": layout.dtype,
        "memory of the KV cache": group.memory,
        "protocol": group.protocol,
    }
