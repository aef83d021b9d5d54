"""What the steps of a node cost, from what it has measured of itself. Pure arithmetic, in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from flowkv_common.wire.messages import ScheduleRequest
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    OutputForecast,
    expected_tokens,
    serves_decode,
    serves_prefill,
)

# Assumed until a node has measured its own: middling figures of a small model on CPU.
DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_DECODE_STEP_S = 0.03


class Speed(msgspec.Struct, frozen=True, gc=False):
    """A step is `base_s` and so much for each thing in it, as in `StepFit`.

    `chunk_base_s` is the part of `base_s` that chunks of a prompt pay too: none where the node has told only
    its rates, for its prefill rate includes it.
    """

    base_s: float
    chunk_base_s: float
    prefill_token_s: float
    attended_token_s: float
    sequence_s: float
    context_token_s: float

    def prefill_s(self, num_new: int, num_cached: int, chunk: int, beside_s: float = 0.0) -> float:
        """Seconds to compute `num_new` tokens behind `num_cached` in steps of at most `chunk` tokens.

        `beside_s` is what else each of these steps computes: the decoding sequences of a mixed node.
        """
        if num_new <= 0:
            return 0.0
        num_steps = -(-num_new // max(1, chunk))
        num_attended = num_new * (num_cached + num_new / 2)
        return (
            num_steps * (self.chunk_base_s + beside_s)
            + num_new * self.prefill_token_s
            + num_attended * self.attended_token_s
        )

    def queue_s(self, num_tokens: int, mean_tokens: float, chunk: int, beside_s: float) -> float:
        """Of a queue of so many tokens, in prompts of about `mean_tokens`, steps shared between them."""
        one_prompt_s = self.prefill_s(num_tokens, 0, chunk, beside_s)
        return max(0.0, one_prompt_s + num_tokens * (mean_tokens - num_tokens) / 2 * self.attended_token_s)

    def chunk_beside_s(self, num_sequences: int, num_context_tokens: int, *, is_decode: bool) -> float:
        """What each chunk's step computes besides.

        On a decode node that is a whole step of its own: a block at a time is never as cheap as its rate.
        """
        whole_s = self.base_s - self.chunk_base_s if is_decode else 0.0
        return whole_s + self.beside_s(num_sequences, num_context_tokens)

    def decode_step_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """Seconds of a step that gives each sequence one token."""
        return self.base_s + self.beside_s(num_sequences, num_context_tokens)

    def beside_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """What decoding sequences add to a step that runs anyway."""
        return num_sequences * self.sequence_s + num_context_tokens * self.context_token_s

    def chunk_within(self, step_s: float, num_sequences: int, num_context_tokens: int) -> int:
        """How many prompt tokens a step may compute beside the decoding sequences and end within `step_s`."""
        left_s = step_s - self.decode_step_s(num_sequences, num_context_tokens)
        return max(0, int(left_s / self.prefill_token_s))


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


class Expected:
    """Masks of nodes by key, one dict for each second in which expectations end."""

    def __init__(self) -> None:
        self._masks_until: dict[int, dict[int, int]] = {}
        self._ended: list[dict[int, int]] = []  # emptied bit by bit: all at once would hold up a request

    def add(self, keys: Sequence[int], bits: int, until: float) -> int:
        """The nodes of these bits will have the keys; forgotten within a second after `until`.

        Returns the second in which the bits are free again.
        """
        second = math.ceil(until)
        if not keys:
            return second
        set_bits(self._masks_until.setdefault(second, {}), keys, bits)
        self._empty(2 * len(keys))
        return second

    def masks(self, now: float) -> list[dict[int, int]]:
        """Those that still count."""
        while self._masks_until and (first := min(self._masks_until)) <= now:
            self._ended.append(self._masks_until.pop(first))
        return list(self._masks_until.values())

    def _empty(self, num_keys: int) -> None:
        while self._ended and num_keys > 0:
            masks = self._ended[-1]
            num_now = min(num_keys, len(masks))
            for _ in range(num_now):
                masks.popitem()
            num_keys -= num_now
            if not masks:
                self._ended.pop()


def set_bits(masks: dict[int, int], keys: Sequence[int], bits: int) -> None:
    for key in keys:
        mask = masks.get(key)
        masks[key] = bits if mask is None else mask | bits  # most are of the same nodes: they share an int


# Assumed of a node that does not tell: one output in so many tokens ends, a chat answer's usual length.
UNKNOWN_STOP_RATE = 1 / 256


class Work(msgspec.Struct, frozen=True, gc=False):
    """What a request adds to a node."""

    prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0
    context_tokens: int = 0
    output_tokens: float = 0.0  # as expected

    def plus(self, other: Work, sign: int = 1) -> Work:
        return Work(
            self.prefill_tokens + sign * other.prefill_tokens,
            self.num_sequences + sign * other.num_sequences,
            self.num_blocks + sign * other.num_blocks,
            self.context_tokens + sign * other.context_tokens,
            self.output_tokens + sign * other.output_tokens,
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
        )


NOTHING = Work()


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """What a node is, its last report, what we gave it since, and what follows from these. Made by `view_of`.

    Tokens, sequences and blocks include what we gave it and its report does not show yet.
    """

    node_id: str
    descriptor: NodeDescriptor
    report: LoadReport
    usable_until: float  # by then it is silent, unless it reports again; -inf if it takes nothing new
    given: Work
    leaves: str | None  # the side that it gets nothing new on: it is being moved to the other
    speed: Speed
    cap: int
    chunk: int  # tokens of a prompt in one step
    may_prefill: bool
    may_decode: bool
    num_tokens_held: int  # at most, by the whole pool
    num_sequences: int
    num_context_tokens: int
    num_queued_tokens: int
    num_available_blocks: int  # free ones and cached ones, which are evicted on demand
    chunk_beside_s: float  # what a prompt's steps compute besides
    prefill_wait_s: float  # until a prompt that comes now is begun
    chunk_s: float  # what prompts that wait here add to a step
    step_s: float  # of a decode step, were one more sequence of mean length there; with `chunk_s`
    tokens_left: float  # that its sequences are expected to produce yet, together
    first_ends_in: float  # steps, until the first of them has ended
    stop_rate: float  # outputs that end of themselves, per token

    @property
    def helps_decode(self) -> bool:
        """A prefill node that decodes besides: what holds up its prompts holds up all who come after them."""
        return self.descriptor.role == "prefill" and self.may_prefill and self.may_decode

    def is_usable(self, now: float) -> bool:
        """May it get new work?"""
        return now <= self.usable_until

    def num_blocks_for_prompt(self, num_tokens: int) -> int:
        return self.descriptor.layout.blocks_for_prompt(num_tokens)

    def can_ever_compute(self, request: ScheduleRequest) -> bool:
        """Could the whole pool hold the prompt?"""
        return self.num_blocks_for_prompt(request.num_prompt_tokens) <= self.descriptor.num_blocks

    def can_ever_hold(self, request: ScheduleRequest) -> bool:
        """Could the whole pool hold the prompt, and all that it may produce?"""
        return request.num_prompt_tokens + request.max_new_tokens <= self.num_tokens_held


def view_of(
    descriptor: NodeDescriptor,
    report: LoadReport,
    speed: Speed,
    heard_at: float,
    given: Work,
    *,
    mean_prompt_tokens: float,
    leaves: str | None,
) -> NodeView:
    """`speed` is the report's; `mean_prompt_tokens` how long prompts are: a queue is one of such prompts."""
    block_size = descriptor.layout.block_size
    silent_at = heard_at + SILENT_AFTER_PERIODS * report.period_s
    cap, blocks = report.max_prefill_tokens_per_step, report.blocks
    chunk = max(cap, block_size)
    may_prefill = serves_prefill(cap, block_size) and leaves != "prefill"
    num_sequences = report.num_running + report.num_waiting + given.num_sequences
    num_context_tokens = report.num_context_tokens + given.context_tokens
    num_queued = report.queued_prefill_tokens + given.prefill_tokens
    beside_s = speed.chunk_beside_s(report.num_running, report.num_context_tokens, is_decode=not may_prefill)
    wait_s = speed.queue_s(num_queued, mean_prompt_tokens, chunk, beside_s)
    step_s = speed.decode_step_s(num_sequences + 1, num_context_tokens + int(mean_prompt_tokens))
    chunk_s = min(num_queued, chunk) * speed.prefill_token_s
    forecast = _forecast_of(report)
    return NodeView(
        node_id=descriptor.node.node_id,
        descriptor=descriptor,
        report=report,
        usable_until=silent_at if report.ready and not report.draining else -math.inf,
        given=given,
        leaves=leaves,
        speed=speed,
        cap=cap,
        chunk=chunk,
        may_prefill=may_prefill,
        may_decode=serves_decode(cap, descriptor.token_budget) and leaves != "decode",
        num_tokens_held=descriptor.num_blocks * block_size,
        num_sequences=num_sequences,
        num_context_tokens=num_context_tokens,
        num_queued_tokens=num_queued,
        num_available_blocks=blocks.free + blocks.cached - given.num_blocks,
        chunk_beside_s=beside_s,
        prefill_wait_s=wait_s,
        chunk_s=chunk_s,
        step_s=step_s + chunk_s,
        tokens_left=forecast.tokens_left + given.output_tokens,
        first_ends_in=_first_ends_in(forecast, given),
        stop_rate=forecast.stop_rate,
    )


def _forecast_of(report: LoadReport) -> OutputForecast:
    """The node's own; else all that is known is how many there are."""
    if report.forecast is not None:
        return report.forecast
    num = report.num_running + report.num_waiting
    left = expected_tokens(math.inf, UNKNOWN_STOP_RATE)
    return OutputForecast(
        tokens_left=num * left, first_ends_in=left / max(1, num), stop_rate=UNKNOWN_STOP_RATE
    )


def _first_ends_in(forecast: OutputForecast, given: Work) -> float:
    """Those that were given last are all still to begin."""
    of_given = given.output_tokens / given.num_sequences if given.num_sequences else math.inf
    return min(forecast.first_ends_in if forecast.tokens_left else math.inf, of_given)
