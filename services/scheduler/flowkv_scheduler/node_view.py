"""One node as the scheduler sees it: what it is and reports, what we gave it since, and what follows.

Pure: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from operator import itemgetter
from typing import NamedTuple

import msgspec

from flowkv_common.wire.messages import PoolLayout, ScheduleRequest
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    OutputForecast,
    expected_tokens,
    serves_decode,
    serves_prefill,
)
from flowkv_scheduler.belief import TRUSTED, Doubt
from flowkv_scheduler.demand import OutputLengths

# Assumed until a node has measured its own: middling figures of a small model on CPU.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.03
# Assumed of a node without a forecast: a token ends its output with this probability, as in a chat.
DEFAULT_STOP_RATE = 1 / 256
# Nodes whose speeds differ by less than this factor are compared by their load alone.
SPEED_CLASS_FACTOR = 1.25
# While a node serves both sides, or works off what is left, its steps take this part of the ITL target. Of a
# prefill node that is all it spends on decoding: the rest is for prompts, which requests elsewhere wait for.
SHARED_ITL = 0.2


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
        """Of prompts that share their steps, of so many tokens; `attended`: the sum of `num_attended`.

        `chunk_tokens`: at least one.
        """
        if num_tokens <= 0:
            return 0.0
        num_steps = -(-num_tokens // chunk_tokens)
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
    """What nodes that can work together share: weights, shape of a block, kind of memory, protocol."""

    fingerprint: str
    layout: PoolLayout
    memory: str
    protocol: int


def group_of(node: NodeDescriptor) -> Group:
    return Group(node.model.fingerprint, node.layout, node.memory, node.protocol)


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
    helps_decode: bool  # a prefill node besides: a delay of its prompts delays all requests behind them
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


class Pending:
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
        if not self._choices:
            return
        num_dropped = max(num_shown, bisect_right(self._choices, now, key=_until))
        for _, work in self._choices[:num_dropped]:
            self.sum = self.sum.plus(work, -1)
        del self._choices[:num_dropped]


_until = itemgetter(0)


class NodeLife:
    """What belongs to one life of one node."""

    def __init__(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report = report
        self.speed = speed
        self.doubt = TRUSTED
        self.heard_at = now
        self.counted: tuple[str, OutputForecast] | None = None  # in the lengths of that model
        self.prompts = Pending(report.num_prompts_accepted)
        self.rooms = Pending(report.num_rooms_given)
        self.sequences = Pending(report.num_sequences_accepted)

    def hear(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report, self.speed, self.heard_at = report, speed, now
        self.prompts.settle(report.num_prompts_accepted, now)
        self.rooms.settle(report.num_rooms_given, now)
        self.sequences.settle(report.num_sequences_accepted, now)


def view_of(
    descriptor: NodeDescriptor, node: NodeLife, mean_prompt_tokens: float, leaves: str | None
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
    attended = report.queued_attended or report.queued_prefill_tokens * mean_prompt_tokens / 2
    attended += given.prefill_attended
    interruptible_attended = (
        report.interruptible_attended or report.interruptible_prefill_tokens * mean_prompt_tokens / 2
    )
    interruptible_attended = min(attended, interruptible_attended + given.interruptible_attended)
    idle_wait_s = speed.queue_s(num_queued, attended, chunk_tokens, beside_s) + doubt.first_token_s
    num_first, first_attended = num_queued - num_interruptible, attended - interruptible_attended
    wait_s = speed.queue_s(num_first, first_attended, chunk_tokens, beside_s) + doubt.first_token_s
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
        helps_decode=descriptor.role == "prefill" and may_prefill and may_decode,
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


def shared_chunk(node: NodeView, itl_s: float) -> int:
    """Prompt tokens per step of a node that serves both sides, beside what it decodes now."""
    # Sequences to come from prompts that wait here must not delay those of now.
    num_sequences = node.report.num_running + node.report.num_waiting
    decode_s = node.speed.decode_step_s(num_sequences, node.report.num_context_tokens)
    chunk = int((SHARED_ITL * itl_s - decode_s) / node.speed.prefill_token_s)
    # No more than the least if even this is too much.
    return max(least_shared_chunk(node.descriptor), min(chunk, node.descriptor.token_budget - 1))


def least_shared_chunk(descriptor: NodeDescriptor) -> int:
    """In tokens: over a block, since a budget of one block is a decode node's."""
    return descriptor.layout.block_size + 1
