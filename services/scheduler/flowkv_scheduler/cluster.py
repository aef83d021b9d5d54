"""What the scheduler knows of the nodes: what they are, how loaded they are, and what it gave them since.

Pure: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from operator import attrgetter, itemgetter
from typing import NamedTuple

import msgspec
from sortedcontainers import SortedDict

from flowkv_common.wire.messages import NodeRef, NodesSeen, PoolLayout, ScheduleRequest
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    OutputForecast,
    expected_tokens,
    serves_decode,
    serves_prefill,
)
from flowkv_scheduler.belief import TRUSTED, Belief, Doubt
from flowkv_scheduler.demand import OutputLengths
from flowkv_scheduler.prefixes import PrefixIndex
from flowkv_scheduler.slices import Sliced

# Assumed until a node has measured its own: middling figures of a small model on CPU.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.03
# Assumed of a node without a forecast: a token ends its output with this probability, as in a chat.
DEFAULT_STOP_RATE = 1 / 256
# Prompts are taken to be so long at first, and the newest one has this weight in the mean.
FIRST_MEAN_PROMPT_TOKENS = 512.0
NEWEST_PROMPT_WEIGHT = 0.05
# The longest wait in TTFT targets, where no other is set. Who misses the target waits in nobody's way.
WAIT_FACTOR = 12.0
# Load reports lag: what we gave a node counts on top of its report for so long, unless one shows it sooner.
CHOICES_COUNT_FOR_PERIODS = 2.0
# The report of a silent node is dropped after this.
FORGET_REPORT_AFTER_S = 60.0
# Nodes whose speeds differ by less than this factor are compared by their load alone.
SPEED_CLASS_FACTOR = 1.25
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
        return self.max_wait_s or WAIT_FACTOR * self.ttft_s

    def of_request(self, request: ScheduleRequest) -> Goals:
        """With its own. Of ITL goals the stricter counts: the batch that it joins has others too."""
        if not (request.ttft_goal_s or request.itl_goal_s):
            return self
        return Goals(
            ttft_s=request.ttft_goal_s or self.ttft_s,
            itl_s=min(request.itl_goal_s or self.itl_s, self.itl_s),
            max_wait_s=self.max_wait_s,
        )


class Work(msgspec.Struct, frozen=True, gc=False):
    """What requests add to a node."""

    prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0
    context_tokens: int = 0
    output_tokens: float = 0.0  # as expected
    interruptible_tokens: int = 0  # of those of prefill
    prefill_attended: int = 0  # `num_attended` of them
    interruptible_attended: int = 0

    def plus(self, other: Work, sign: int = 1) -> Work:
        return Work(
            self.prefill_tokens + sign * other.prefill_tokens,
            self.num_sequences + sign * other.num_sequences,
            self.num_blocks + sign * other.num_blocks,
            self.context_tokens + sign * other.context_tokens,
            self.output_tokens + sign * other.output_tokens,
            self.interruptible_tokens + sign * other.interruptible_tokens,
            self.prefill_attended + sign * other.prefill_attended,
            self.interruptible_attended + sign * other.interruptible_attended,
        )

    def share(self, part: int, whole: int) -> Work:
        """That of `part` requests, where all of this is of `whole`."""
        if part == whole:
            return self
        return Work(
            self.prefill_tokens * part // whole,
            self.num_sequences * part // whole,
            self.num_blocks * part // whole,
            self.context_tokens * part // whole,
            self.output_tokens * part / whole,
            self.interruptible_tokens * part // whole,
            self.prefill_attended * part // whole,
            self.interruptible_attended * part // whole,
        )


NOTHING = Work()


class Speed(msgspec.Struct, frozen=True, gc=False):
    """Seconds of an engine step: `base_s`, and so much for each thing in it, as in `StepFit`.

    `chunk_base_s` is the part of `base_s` that a prompt's chunk pays: 0 where the node reports only its
    rates, for its prefill rate includes it.
    """

    base_s: float
    chunk_base_s: float
    prefill_token_s: float
    attended_token_s: float
    sequence_s: float
    context_token_s: float

    def times(self, factor: float) -> Speed:
        """Of a node that is so many times slower."""
        return Speed(*(factor * seconds for seconds in msgspec.structs.astuple(self)))

    def prefill_s(self, num_new: int, num_cached: int, chunk_tokens: int, beside_s: float) -> float:
        """Seconds to compute `num_new` tokens behind `num_cached` in steps of at most `chunk_tokens`.

        `beside_s` is what each of these steps computes for decoding sequences.
        """
        return self.queue_s(num_new, num_new * (num_cached + num_new / 2), chunk_tokens, beside_s)

    def queue_s(self, num_tokens: int, attended: float, chunk_tokens: int, beside_s: float) -> float:
        """Of prompts that share their steps, of so many tokens; `attended`: the sum of `num_attended`."""
        if num_tokens <= 0:
            return 0.0
        num_steps = -(-num_tokens // max(1, chunk_tokens))
        return (
            num_steps * (self.chunk_base_s + beside_s)
            + num_tokens * self.prefill_token_s
            + attended * self.attended_token_s
        )

    def decode_step_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """Of a step that gives each sequence one token."""
        return self.base_s + self.beside_s(num_sequences, num_context_tokens)

    def beside_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """What decoding sequences add to a step that runs anyway."""
        return num_sequences * self.sequence_s + num_context_tokens * self.context_token_s


def speed_of(report: LoadReport) -> Speed:
    """From the fit that the node reports; from its plain rates what is missing in it."""
    rate = report.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S
    step_s = report.decode_step_s or DEFAULT_DECODE_STEP_S
    fit = report.step
    if fit is None:
        return Speed(step_s, 0.0, 1 / rate, 0.0, step_s / max(1, report.max_num_seqs), 0.0)
    return Speed(
        base_s=fit.base_s or step_s,
        chunk_base_s=fit.base_s,
        prefill_token_s=fit.prefill_token_s or 1 / rate,
        attended_token_s=fit.attended_token_s,
        sequence_s=fit.sequence_s,
        context_token_s=fit.context_token_s,
    )


class Group(NamedTuple):
    """What nodes that can exchange blocks have in common: weights, shape of a block, kind of memory."""

    fingerprint: str
    layout: PoolLayout
    memory: str


def group_of(node: NodeDescriptor) -> Group:
    return Group(node.model.fingerprint, node.layout, node.memory)


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """What a node is, its last report, what we gave it since, and what follows from these. Made by `view_of`.

    Tokens, sequences and blocks include what we gave it and its report does not show yet.
    """

    node_id: str
    descriptor: NodeDescriptor
    group: Group
    report: LoadReport
    usable_until: float  # silent after that, unless it reports again; -inf if it takes nothing new
    given: Work
    speed: Speed  # as believed
    doubt: Doubt  # of what the node says
    chunk_budget: int  # prompt tokens per step, the one number that says what the node is
    chunk_tokens: int  # of a prompt, in one step
    may_prefill: bool
    may_decode: bool
    num_tokens_held: int  # at most, by the whole pool
    num_sequences: int
    num_context_tokens: int
    num_queued_tokens: int
    num_available_blocks: int  # free ones and cached ones, which are evicted on demand
    num_free_places: int  # in the batch
    chunk_beside_s: float  # what a prompt's steps compute for decoding sequences
    prefill_wait_s: float  # until a prompt in time that comes now is begun: it interrupts others
    idle_wait_s: float  # until all prompts are computed that are here: until then a late one waits
    chunk_s: float  # what prompts that wait here add to a step
    step_s: float  # of a decode step, were one more sequence of mean length there; with `chunk_s`
    tokens_left: float  # that its sequences are expected to produce yet, together
    first_ends_in: float  # steps, until the first of them has ended
    stop_rate: float  # outputs that end by themselves, per token
    # On a side the class of speed, the seconds until it could begin, or of a step, and the node id. A prompt
    # that would interrupt no other is preferred to one that would as soon.
    prefill_rank: tuple[int, float, float, str] | None
    decode_rank: tuple[int, float, str] | None
    # Of a node that decodes and has a place: the one with the most blocks comes first.
    room_rank: tuple[int, int, str] | None
    id_rank: tuple[int, str]

    @property
    def helps_decode(self) -> bool:
        """A prefill node that decodes besides: a delay of its prompts delays all requests behind them."""
        return self.descriptor.role == "prefill" and self.may_prefill and self.may_decode

    def is_usable(self, now: float) -> bool:
        """May it get new work?"""
        return now <= self.usable_until

    def own_word(self, first_token_s: float) -> float:
        """When a first token would come by what the node says. Believed is `first_token_s`."""
        return max(0.0, first_token_s - self.doubt.first_token_s) / self.doubt.slowness

    @property
    def own_step_s(self) -> float:
        """`step_s` by what the node says."""
        return (self.step_s - self.doubt.step_s) / self.doubt.slowness

    def can_ever_compute(self, request: ScheduleRequest) -> bool:
        """Could the whole pool hold the prompt?"""
        num_blocks = self.descriptor.layout.blocks_for_prompt(request.num_prompt_tokens)
        return num_blocks <= self.descriptor.num_blocks

    def can_ever_hold(self, request: ScheduleRequest) -> bool:
        """Could the whole pool hold the prompt, and all that it may produce?"""
        return request.num_prompt_tokens + request.max_new_tokens <= self.num_tokens_held

    def need_of(self, request: ScheduleRequest, lengths: OutputLengths) -> Work:
        """The room that the request takes here, output included, and the work that it brings."""
        outputs = expected_tokens(request.max_new_tokens, 1.0 / lengths.mean_of(request.num_prompt_tokens))
        return Work(
            prefill_tokens=request.num_prompt_tokens,
            num_sequences=1,
            num_blocks=self.descriptor.layout.blocks_for_prompt(request.num_prompt_tokens + int(outputs)),
            context_tokens=request.num_prompt_tokens,
            output_tokens=outputs,
        )

    def num_missing_places(self, held: Work) -> int:
        """In the batch, for one more sequence beside those of `held`."""
        return held.num_sequences + 1 - self.num_free_places


class _Pending:
    """Our choices for one side of a node, until its reports show them."""

    def __init__(self, num_accepted: int) -> None:
        self.sum = NOTHING
        self._num_accepted = num_accepted
        self._choices: list[tuple[float, Work]] = []  # until when each counts, soonest first

    def add_choice(self, until: float, work: Work) -> None:
        insort(self._choices, (until, work), key=_until)
        self.sum = self.sum.plus(work)

    def settle(self, num_accepted: int, now: float) -> None:
        """Drop as many as the node has accepted since, oldest first, and those whose time is over."""
        num_shown = max(0, num_accepted - self._num_accepted)
        self._num_accepted = num_accepted
        num_dropped = max(num_shown, bisect_right(self._choices, now, key=_until))
        for _, work in self._choices[:num_dropped]:
            self.sum = self.sum.plus(work, -1)
        del self._choices[:num_dropped]


_until = itemgetter(0)


class _Node:
    """What belongs to one life of one node."""

    def __init__(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report = report
        self.speed = speed
        self.doubt = TRUSTED
        self.heard_at = now
        self.counted: tuple[str, OutputForecast] | None = None  # in the lengths of that model
        self.prompts = _Pending(report.num_prompts_accepted)
        self.rooms = _Pending(report.num_rooms_given)
        self.sequences = _Pending(report.num_sequences_accepted)

    def hear(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report, self.speed, self.heard_at = report, speed, now
        self.prompts.settle(report.num_prompts_accepted, now)
        self.rooms.settle(report.num_rooms_given, now)
        self.sequences.settle(report.num_sequences_accepted, now)


def view_of(
    descriptor: NodeDescriptor, node: _Node, mean_prompt_tokens: float, leaves: str | None
) -> NodeView:
    """`mean_prompt_tokens`: where a queue does not tell. `leaves`: the side that gets nothing new here."""
    report, doubt = node.report, node.doubt
    speed = node.speed if doubt is TRUSTED else node.speed.times(doubt.slowness)
    node_id, block_size = descriptor.node.node_id, descriptor.layout.block_size
    given = node.prompts.sum.plus(node.rooms.sum).plus(node.sequences.sum)
    silent_at = node.heard_at + SILENT_AFTER_PERIODS * report.period_s
    budget, blocks = report.max_prefill_tokens_per_step, report.blocks
    chunk_tokens = max(budget, block_size)
    may_prefill = serves_prefill(budget, block_size) and leaves != "prefill"
    may_decode = serves_decode(budget, descriptor.token_budget) and leaves != "decode"
    num_sequences = report.num_running + report.num_waiting + given.num_sequences
    num_context_tokens = report.num_context_tokens + given.context_tokens
    num_queued = report.queued_prefill_tokens + given.prefill_tokens
    # A chunk on a decode node takes a whole step: a block at a time is never as cheap as its rate.
    base_s = 0.0 if may_prefill else speed.base_s - speed.chunk_base_s
    beside_s = base_s + speed.beside_s(report.num_running, report.num_context_tokens)
    num_interruptible = min(num_queued, report.interruptible_prefill_tokens + given.interruptible_tokens)
    # Older nodes don't tell: then prompts are taken to be of mean length.
    attended, interruptible_attended = (
        told or num_tokens * mean_prompt_tokens / 2
        for told, num_tokens in (
            (report.queued_attended, report.queued_prefill_tokens),
            (report.interruptible_attended, report.interruptible_prefill_tokens),
        )
    )
    attended += given.prefill_attended
    interruptible_attended = min(attended, interruptible_attended + given.interruptible_attended)
    wait_s, idle_wait_s = (
        speed.queue_s(*ahead, chunk_tokens, beside_s) + doubt.first_token_s
        for ahead in (
            (num_queued - num_interruptible, attended - interruptible_attended),
            (num_queued, attended),
        )
    )
    # A chunk that has begun is not interrupted: on the mean half of it is left, and of its prompt as much is
    # computed as is left.
    chunk = min(num_interruptible, chunk_tokens)
    wait_s += speed.prefill_s(chunk, num_interruptible, chunk_tokens, beside_s) / 2
    chunk_s = min(num_queued, chunk_tokens) * speed.prefill_token_s
    step_s = speed.decode_step_s(num_sequences + 1, num_context_tokens + int(mean_prompt_tokens)) + chunk_s
    step_s += doubt.step_s
    forecast = report.forecast
    if forecast is None:  # all that is known is how many there are
        num = report.num_running + report.num_waiting
        left = expected_tokens(math.inf, DEFAULT_STOP_RATE)
        forecast = OutputForecast(
            tokens_left=num * left, first_ends_in=left / max(1, num), stop_rate=DEFAULT_STOP_RATE
        )
    # What is there now and comes will grow: without that room sequences would be preempted.
    num_growing = int((forecast.tokens_left + given.output_tokens) / block_size)
    num_available = blocks.free + blocks.cached - given.num_blocks - num_growing
    num_free_places = max(1, report.max_num_seqs) - num_sequences
    # What was given last is all still to begin.
    given_ends_in = given.output_tokens / given.num_sequences if given.num_sequences else math.inf
    return NodeView(
        node_id=node_id,
        descriptor=descriptor,
        group=group_of(descriptor),
        report=report,
        usable_until=silent_at if report.ready and not report.draining else -math.inf,
        given=given,
        speed=speed,
        doubt=doubt,
        chunk_budget=budget,
        chunk_tokens=chunk_tokens,
        may_prefill=may_prefill,
        may_decode=may_decode,
        num_tokens_held=descriptor.num_blocks * block_size,
        num_sequences=num_sequences,
        num_context_tokens=num_context_tokens,
        num_queued_tokens=num_queued,
        num_available_blocks=num_available,
        num_free_places=num_free_places,
        chunk_beside_s=beside_s,
        prefill_wait_s=wait_s,
        idle_wait_s=idle_wait_s,
        chunk_s=chunk_s,
        step_s=step_s,
        tokens_left=forecast.tokens_left + given.output_tokens,
        first_ends_in=min(forecast.first_ends_in if forecast.tokens_left else math.inf, given_ends_in),
        stop_rate=forecast.stop_rate,
        prefill_rank=(
            (speed_class(speed.prefill_token_s), wait_s, idle_wait_s, node_id) if may_prefill else None
        ),
        decode_rank=(speed_class(speed.base_s), step_s, node_id) if may_decode else None,
        room_rank=(0, -num_available, node_id) if may_decode and num_free_places > 0 else None,
        id_rank=(0, node_id),
    )


def speed_class(seconds: float) -> int:
    return round(math.log(seconds, SPEED_CLASS_FACTOR))


class NodeGroup:
    """Nodes that can exchange blocks: all of them, and each side, the soonest of each speed class first."""

    def __init__(self) -> None:
        self.members: SortedDict = SortedDict()  # `id_rank` -> node
        self.prefill: SortedDict = SortedDict()  # `prefill_rank` -> node
        self.decode: SortedDict = SortedDict()  # `decode_rank` -> node
        self.roomiest: SortedDict = SortedDict()  # `room_rank` -> node: those with a place
        self.prompt_tokens_per_s = 0.0  # of the prefill side together

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


id_rank = attrgetter("id_rank")
prefill_rank = attrgetter("prefill_rank")
decode_rank = attrgetter("decode_rank")
room_rank = attrgetter("room_rank")


class ClusterState:
    """Joins descriptors and reports by node *and* incarnation: a former life never passes for the present."""

    def __init__(self) -> None:
        self.prefixes = PrefixIndex()
        self.belief = Belief()
        self.mean_prompt_tokens = FIRST_MEAN_PROMPT_TOKENS
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._nodes: dict[NodeRef, _Node] = {}
        self._views: dict[str, NodeView] = {}
        self._groups: SortedDict = SortedDict(repr)  # group -> `NodeGroup`
        self._leaving: dict[str, str] = {}
        self.doubted: Set[NodeRef] = frozenset()  # nodes that don't do what they say
        self._if_tried: dict[NodeRef, Doubt] = {}  # whom to doubt as soon as it has work
        self._tried: set[NodeRef] = set()  # since the last `doubt_nodes`
        self.lengths: defaultdict[str, OutputLengths] = defaultdict(OutputLengths)
        self._costs: defaultdict[str, dict[str, float]] = defaultdict(dict)  # by model, as last measured

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """All nodes of the registry, by id."""
        before, self._descriptors = self._descriptors, dict(descriptors)
        models = {descriptor.model.fingerprint for descriptor in descriptors.values()}
        for model in self._costs.keys() - models:
            del self._costs[model]
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
            self._nodes[report.node] = _Node(report, self._speed_of(report), now)
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

    def learn_prompt_length(self, num_tokens: int) -> None:
        """The mean length of prompts tells what a queue of so many tokens costs."""
        self.mean_prompt_tokens += NEWEST_PROMPT_WEIGHT * (num_tokens - self.mean_prompt_tokens)

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

    def _try(self, ref: NodeRef, node: _Node) -> None:
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
        known, guessed = self._costs[descriptor.model.fingerprint], dict[str, float]()
        for names, is_measured, has_rate in (
            (("base_s", "chunk_base_s"), fit and fit.base_s, report.decode_step_s),
            (
                ("prefill_token_s", "attended_token_s"),
                fit and fit.prefill_token_s,
                report.prefill_tokens_per_s,
            ),
            (("sequence_s", "context_token_s"), fit and fit.sequence_s + fit.context_token_s, 0.0),
        ):
            if is_measured:
                known |= {name: getattr(speed, name) for name in names}
            elif not has_rate:
                guessed |= {name: known[name] for name in names if name in known}
        return msgspec.structs.replace(speed, **guessed) if guessed else speed

    def lengths_of(self, fingerprint: str) -> OutputLengths:
        """How long outputs of a model become."""
        return self.lengths.get(fingerprint) or OutputLengths()

    def _learn_lengths(self, node: _Node, *, leaves: bool = False) -> None:
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
            view = view_of(descriptor, known, self.mean_prompt_tokens, self._leaving.get(node_id))
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
    """Which nodes can't exchange blocks with most of the nodes, and what differs; None if all can."""
    groups: dict[Group, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: node.node.node_id):
        groups[group_of(node)].append(node.node.node_id)
    if len(groups) < 2:
        return None
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
        "KV dtype": layout.dtype,
        "memory of the KV cache": group.memory,
    }
