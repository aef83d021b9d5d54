"""What a simulated node computes: engine steps of unchanging batches in closed form, a stretch at a time.

As `flowkv_node/steps.py` plans a step: one token for each decoding sequence, then prompt tokens, in the order
in which prompts are due, up to the prefill chunk budget (`cap`). One thing differs: a chunk that does not end
its prompt is the step's last, while a node may fill the rest, under a block, with the last tokens of another.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import msgspec

from benchmarks.simulator.pool import Lease
from flowkv.bench.traces import Piece, Request
from flowkv_common.wire.nodes import StepFit, num_attended
from flowkv_node.measures import StepCounts, StepFitter

# How much the newest step counts in measured rates: as in `flowkv_node/steps.py`.
SMOOTHING = 0.2
# Relative width of a histogram's buckets, and so the error of its quantiles.
BUCKET_WIDTH = 0.02
_LOG_WIDTH = math.log1p(BUCKET_WIDTH)


def step_s(fit: StepFit, prompt_tokens: int, pairs: int, num_sequences: int, context_tokens: int) -> float:
    """Seconds of one step: the sum that `StepFit` states."""
    return (
        fit.base_s
        + fit.prefill_token_s * prompt_tokens
        + fit.attended_token_s * pairs
        + fit.sequence_s * num_sequences
        + fit.context_token_s * context_tokens
    )


def slowed(fit: StepFit, factor: float) -> StepFit:
    return StepFit(**{name: factor * value for name, value in msgspec.structs.asdict(fit).items()})


@dataclass(slots=True, eq=False)
class Life:
    """What has happened to a request so far. Times in seconds of the simulation, 0 until they are known."""

    number: int
    request: Request
    prefill: int = -1  # index of the node
    decode: int = -1
    at_prefill: Lease | None = None
    at_decode: Lease | None = None
    pieces: Sequence[Piece] = ()  # of its prompt, for the prefix cache
    block_hashes: list[str] = field(default_factory=list)  # while it asks for nodes
    due_s: float = 0.0  # its first token, for the order of prompts at its node
    interruptible_until_s: float = 0.0  # by prompts in time
    num_waits: int = 0
    num_cached_tokens: int = 0  # that prefill did not compute
    num_moved_tokens: int = 0  # that decode did not have
    num_produced: int = 0  # tokens, when it last joined a batch or left it
    joined_at_step: int = 0
    first_token_s: float = 0.0
    newest_token_s: float = 0.0  # when it last joined a batch or left it
    last_token_s: float = 0.0
    refused_with: int = 0  # the code of the error
    is_bad: bool = False  # it has missed a target

    def num_cached_in(self, lease: Lease, block_size: int) -> int:
        """Tokens of the prompt that the lease found cached. The last one is always computed."""
        return min(lease.num_cached, (self.request.num_prompt_tokens - 1) // block_size) * block_size

    @property
    def num_tokens(self) -> int:
        """Of the prompt and, as it last joined a batch or left it, of the answer."""
        return self.request.num_prompt_tokens + self.num_produced

    @property
    def is_done(self) -> bool:
        return self.last_token_s > 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 where there is none."""
        num_intervals = self.request.num_output_tokens - 1
        return (self.last_token_s - self.first_token_s) / num_intervals if num_intervals else 0.0


class Histogram:
    """Times between tokens, in logarithmic buckets: millions of values in a few numbers."""

    def __init__(self) -> None:
        self._weights: defaultdict[int, int] = defaultdict(int)

    def add_value(self, value_s: float, weight: int = 1) -> None:
        if weight:
            self._weights[_bucket(value_s)] += weight

    def add_ramp(self, first_s: float, growth_s: float, num_values: int, weight: int) -> None:
        """`num_values` values that grow by `growth_s`, each `weight` times."""
        if not weight:
            return
        done = 0
        while done < num_values:
            bucket, upto = _bucket(first_s + done * growth_s), num_values
            border_s = math.exp((bucket + 1) * _LOG_WIDTH)
            if first_s + (num_values - 1) * growth_s >= border_s:
                upto = min(num_values, max(done + 1, math.ceil((border_s - first_s) / growth_s)))
            self._weights[bucket] += weight * (upto - done)
            done = upto

    def total(self) -> int:
        return sum(self._weights.values())

    def quantile(self, part: float) -> float:
        """The middle of the bucket in which the `part` lies, in seconds; 0 of nothing."""
        wanted, seen = part * self.total(), 0
        for bucket in sorted(self._weights):
            seen += self._weights[bucket]
            if seen >= wanted:
                return math.exp((bucket + 0.5) * _LOG_WIDTH)
        return 0.0


def _bucket(value_s: float) -> int:
    return math.floor(math.log(value_s) / _LOG_WIDTH)


class Stretch(NamedTuple):
    """`num_steps` steps in a row with the same sequences and chunk: step j takes `first_s + j x growth_s`."""

    begin_s: float
    first_s: float
    growth_s: float
    num_steps: int
    num_decoding: int
    prompt_tokens: int  # of each step
    num_pairs: int = 0  # of the first
    num_context: int = 0

    @property
    def end_s(self) -> float:
        return self.after(self.num_steps)

    def after(self, num_steps: int) -> float:
        """When `num_steps` steps have ended."""
        return self.begin_s + num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def num_started(self, now: float) -> int:
        """Steps that must end before a change at `now` counts: up to the first border at or after it.

        At least one, since a stretch starts with its first step running; at most all.
        """
        # The root of `after`, in the form that is stable for any growth. It is exact but for rounding: the
        # borders themselves decide.
        elapsed_s = max(0.0, now - self.begin_s)
        half = self.first_s - self.growth_s / 2
        root = 2 * elapsed_s / (half + math.sqrt(half * half + 2 * self.growth_s * elapsed_s))
        num_steps = min(self.num_steps, max(1, math.ceil(root)))
        while num_steps > 1 and self.after(num_steps - 1) >= now:
            num_steps -= 1
        while num_steps < self.num_steps and self.after(num_steps) < now:
            num_steps += 1
        return num_steps

    def num_ended(self, now: float) -> int:
        """Steps that have ended at `now`."""
        num_steps = self.num_started(now)
        return num_steps if self.after(num_steps) <= now else num_steps - 1


class Limits(NamedTuple):
    """Of one step, in tokens; `max_num_seqs` in sequences."""

    block_size: int
    token_budget: int
    max_num_seqs: int


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt that has its blocks. `num_computed` tokens have their KV, cached ones included."""

    life: Life
    num_tokens: int
    num_computed: int
    due_s: float = 0.0
    first_chunk_at: float = 0.0  # when its first chunk ended
    num_last: int = 0  # tokens of the chunk that ended it

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_computed


class Batch:
    """The work that has its blocks.

    Anything may be added or changed between two stretches. During one, it counts only from the next on.
    """

    def __init__(self, fit: StepFit, limits: Limits, cap: int, itl: Histogram) -> None:
        self.fit = fit
        self.limits = limits
        self.cap = cap
        self.prompts: deque[Prompt] = deque()
        self.waiting: deque[Life] = deque()  # for a place among the decoding
        self.stretch: Stretch | None = None
        self.num_context = 0  # tokens of the decoding sequences, the newest included
        self.num_grown = 0  # of these, those that the sequences have produced
        self.decode_step_s = 0.0  # smoothed, as a node measures them; 0: not yet
        self.prefill_tokens_per_s = 0.0
        self.busy_s = 0.0
        self.fitter = StepFitter()
        self._itl = itl
        self._num_steps = 0  # in all: each gives each decoding sequence one token
        self._decoding: list[tuple[int, int, Life]] = []  # by the number of the step that is their last
        self._fresh: list[Life] = []  # joined since the last stretch
        self._chunks: list[tuple[Prompt, int]] = []  # of each step of the stretch

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    def add_prompt(self, prompt: Prompt) -> bool:
        """True if it comes before all others, one that is being computed among them."""
        insort(self.prompts, prompt, key=attrgetter("due_s"))
        return self.prompts[0] is prompt

    def begin(self, now: float, num_free_tokens: int) -> Stretch | None:
        """The next stretch, with all that is here; None when there is nothing to do.

        No longer than the decoding sequences find `num_free_tokens` to grow into.
        """
        assert self.stretch is None, "one stretch at a time"
        while self.waiting and len(self._decoding) < self.limits.max_num_seqs:
            self._join(self.waiting.popleft())
        if not self._decoding and not self.prompts:
            return None
        num_steps = self._plan_chunks(now)
        if self._decoding:
            steps_left = self._decoding[0][0] - self._num_steps
            num_steps = min(num_steps, steps_left) if self._chunks else steps_left
            num_steps = min(num_steps, max(1, num_free_tokens // len(self._decoding)))
        tokens = sum(num for _, num in self._chunks)
        pairs = sum(num_attended(num, prompt.num_computed) for prompt, num in self._chunks)
        num_decoding = len(self._decoding)
        self.stretch = Stretch(
            begin_s=now,
            first_s=step_s(self.fit, tokens, pairs, num_decoding, self.num_context),
            # Each step the contexts grow by a token each, and the chunk lies a chunk further back.
            growth_s=self.fit.attended_token_s * tokens * tokens + self.fit.context_token_s * num_decoding,
            num_steps=num_steps,
            num_decoding=num_decoding,
            prompt_tokens=tokens,
            num_pairs=pairs,
            num_context=self.num_context,
        )
        return self.stretch

    def cut(self, now: float) -> bool:
        """Something has changed: end the stretch at the first border at or after `now`.

        True if that is sooner than it would have ended.
        """
        if self.stretch is None:
            return False
        num_steps = self.stretch.num_started(now)
        is_sooner = num_steps < self.stretch.num_steps
        self.stretch = self.stretch._replace(num_steps=num_steps)
        return is_sooner

    def end(self) -> tuple[list[Prompt], list[Life]]:
        """Account for the whole stretch, at its end: the prompts and the sequences that end with it."""
        stretch, self.stretch = self.stretch, None
        assert stretch is not None, "a stretch is running"
        self.busy_s += stretch.end_s - stretch.begin_s
        self._observe(stretch)
        self._num_steps += stretch.num_steps
        self.num_context += stretch.num_steps * stretch.num_decoding
        self.num_grown += stretch.num_steps * stretch.num_decoding
        for prompt, num in self._chunks:
            prompt.num_computed += num * stretch.num_steps
            prompt.first_chunk_at = prompt.first_chunk_at or stretch.after(1)
            prompt.num_last = num
        computed = [prompt for prompt in self.prompts if not prompt.num_left]
        if computed:
            self.prompts = deque(prompt for prompt in self.prompts if prompt.num_left)
        finished = []
        while self._decoding and self._decoding[0][0] == self._num_steps:
            life = heapq.heappop(self._decoding)[2]
            self._count_out(life)
            finished.append(life)
        return computed, finished

    def preempt_newest(self, now: float) -> Life:
        """Between two stretches: takes the sequence that joined last out."""
        newest = max(self._decoding, key=lambda one: (one[2].joined_at_step, one[1]))
        self._decoding.remove(newest)
        heapq.heapify(self._decoding)
        life = newest[2]
        self._count_out(life)
        life.newest_token_s = now
        return life

    def _count_out(self, life: Life) -> None:
        life.num_produced = self._produced(life, self._num_steps)
        self.num_context -= life.num_tokens
        self.num_grown -= life.num_produced

    def _produced(self, life: Life, num_steps: int) -> int:
        return life.num_produced + num_steps - life.joined_at_step

    def queued(self, now: float) -> Iterator[tuple[Life, int, int]]:
        """Of each prompt the tokens computed by `now`, as far as whole steps tell, and those not yet."""
        num_ended = self.stretch.num_ended(now) if self.stretch else 0
        chunks = {prompt.life.number: num for prompt, num in self._chunks} if num_ended else {}
        for prompt in self.prompts:
            num_more = num_ended * chunks.get(prompt.life.number, 0)
            yield prompt.life, prompt.num_computed + num_more, prompt.num_left - num_more

    def num_context_at(self, now: float) -> int:
        num_grown = self.stretch.num_ended(now) * self.stretch.num_decoding if self.stretch else 0
        return self.num_context + num_grown

    def num_grown_at(self, now: float) -> int:
        return self.num_grown + self.num_context_at(now) - self.num_context

    def outputs_at(self, now: float) -> list[tuple[int, int, int]]:
        """Of each sequence the tokens of its prompt, those that it has produced, and may produce yet."""
        num_steps = self._num_steps + (self.stretch.num_ended(now) if self.stretch else 0)
        lives = [(life, self._produced(life, num_steps)) for _, _, life in self._decoding]
        lives += ((life, life.num_produced) for life in self.waiting)
        return [(life.request.num_prompt_tokens, num, life.request.max_tokens - num) for life, num in lives]

    def _join(self, life: Life) -> None:
        """A sequence comes with its newest token, whose KV the next step computes."""
        self.num_context += life.num_tokens
        self.num_grown += life.num_produced
        life.joined_at_step = self._num_steps
        last_step = self._num_steps + life.request.num_output_tokens - life.num_produced
        heapq.heappush(self._decoding, (last_step, life.number, life))
        self._fresh.append(life)

    def _plan_chunks(self, now: float) -> int:
        """Chooses the chunks of the next steps; how many steps they stay the same (0 without prompts)."""
        self._chunks = []
        if not self.prompts:
            return 0
        block_size = self.limits.block_size
        room = max(min(self.limits.token_budget - len(self._decoding), self.cap), block_size)
        # Interruptible ones only while there is no other.
        prompts = [one for one in self.prompts if now >= one.life.interruptible_until_s] or self.prompts
        head = prompts[0]
        if head.num_left > room:
            chunk = room - room % block_size
            self._chunks = [(head, chunk)]
            # As long as what is left does not fit into one step.
            return -(-(head.num_left - room) // chunk)
        for prompt in prompts:
            num_tokens = min(prompt.num_left, room)
            if num_tokens < prompt.num_left:
                num_tokens -= (prompt.num_computed + num_tokens) % block_size
            if num_tokens <= 0:
                break
            self._chunks.append((prompt, num_tokens))
            room -= num_tokens
            if num_tokens < prompt.num_left:
                break
        return 1

    def _observe(self, stretch: Stretch) -> None:
        fresh, self._fresh = self._fresh, []
        first_s, growth_s, num_decoding = stretch.first_s, stretch.growth_s, stretch.num_decoding
        for life in fresh:
            self._itl.add_value(stretch.begin_s + first_s - life.newest_token_s)
        self._itl.add_value(first_s, num_decoding - len(fresh))
        if stretch.num_steps > 1:
            self._itl.add_ramp(first_s + growth_s, growth_s, stretch.num_steps - 1, num_decoding)
        last_s = first_s + (stretch.num_steps - 1) * growth_s
        for place in sorted({0, stretch.num_steps // 2, stretch.num_steps - 1}):  # a node sees all of them
            counts = StepCounts(
                stretch.prompt_tokens,
                stretch.num_pairs + place * stretch.prompt_tokens**2,
                num_decoding,
                stretch.num_context + place * num_decoding,
            )
            self.fitter.observe(counts, first_s + place * growth_s)
        if not stretch.prompt_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, last_s, stretch.num_steps)
        elif stretch.prompt_tokens + num_decoding >= 16:
            rate = (stretch.prompt_tokens + num_decoding) / last_s
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, rate, stretch.num_steps)


def _smooth(old: float, new: float, num_times: int) -> float:
    """As if `new` had been measured so many times in a row."""
    if not old:
        return new
    return new + (old - new) * (1 - SMOOTHING) ** num_times
