"""What a simulated node computes: decoding sequences and a queue of prompts, stretch by stretch.

As `flowkv_node/steps.py` plans a step: one token for each decoding sequence, then prompt tokens, first come
first served, up to the cap. One thing differs: a chunk that does not end its prompt is the step's last, while
a node may fill what is left, under a block, with the last tokens of another prompt.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.simulate.histogram import Histogram
from benchmarks.simulate.life import Life
from benchmarks.simulate.stretch import Stretch, chunk_pairs, step_s
from flowkv_common.wire.nodes import StepFit

# How much the newest step counts in measured rates: as in `flowkv_node/steps.py`.
SMOOTHING = 0.2


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
    first_chunk_at: float = 0.0  # when its first chunk ended
    num_last: int = 0  # tokens of the chunk that ended it

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_computed


class Ended(NamedTuple):
    """What a stretch has brought about at its end."""

    prompts: list[Prompt]
    sequences: list[Life]


class Batch:
    """The work that has its blocks. Between two stretches anything may be added or changed, during one only
    counts from the next on."""

    def __init__(self, fit: StepFit, limits: Limits, cap: int, itl: Histogram) -> None:
        self.fit = fit
        self.limits = limits
        self.cap = cap
        self.prompts: deque[Prompt] = deque()
        self.waiting: deque[Life] = deque()  # for a place among the decoding
        self.stretch: Stretch | None = None
        self.num_context = 0  # tokens of the decoding sequences, the newest included
        # Blocks that sequences on their way here have, and don't need yet: known to the simulator alone.
        self.num_early_blocks = 0
        self.decode_step_s = 0.0  # smoothed, as a node measures them; 0: not yet
        self.prefill_tokens_per_s = 0.0
        self.busy_s = 0.0
        self._itl = itl
        self._num_steps = 0  # in all: each gives each decoding sequence one token
        self._decoding: list[tuple[int, int, Life]] = []  # by the number of the step that is their last
        self._fresh: list[Life] = []  # joined since the last stretch
        self._chunks: list[tuple[Prompt, int]] = []  # of each step of the stretch

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def is_filled(self) -> bool:
        """Do the prompts of the running stretch leave no room for others?"""
        return self.stretch is not None and self.stretch.prompt_tokens > 0

    def begin(self, now: float) -> Stretch | None:
        """The next stretch, with all that is here; None when there is nothing to do."""
        assert self.stretch is None, "one stretch at a time"
        self._join()
        if not self._decoding and not self.prompts:
            return None
        num_steps = self._plan_chunks()
        if self._decoding:
            steps_left = self._decoding[0][0] - self._num_steps
            num_steps = min(num_steps, steps_left) if self._chunks else steps_left
        tokens = sum(num for _, num in self._chunks)
        pairs = sum(chunk_pairs(prompt.num_computed, num) for prompt, num in self._chunks)
        num_decoding = len(self._decoding)
        self.stretch = Stretch(
            begin_s=now,
            first_s=step_s(self.fit, tokens, pairs, num_decoding, self.num_context),
            # Each step the contexts grow by a token each, and the chunk lies a chunk further back.
            growth_s=self.fit.attended_token_s * tokens * tokens + self.fit.context_token_s * num_decoding,
            num_steps=num_steps,
            num_decoding=num_decoding,
            prompt_tokens=tokens,
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
        if is_sooner:
            self.stretch = self.stretch.cut(num_steps)
        return is_sooner

    def end(self) -> Ended:
        """Account for the whole stretch, at its end."""
        stretch, self.stretch = self.stretch, None
        assert stretch is not None, "a stretch is running"
        self.busy_s += stretch.end_s - stretch.begin_s
        self._observe(stretch)
        self._num_steps += stretch.num_steps
        self.num_context += stretch.num_steps * stretch.num_decoding
        for prompt, num in self._chunks:
            prompt.num_computed += num * stretch.num_steps
            prompt.first_chunk_at = prompt.first_chunk_at or stretch.after(1)
            prompt.num_last = num
        computed = []
        while self.prompts and not self.prompts[0].num_left:
            computed.append(self.prompts.popleft())
        finished = []
        while self._decoding and self._decoding[0][0] == self._num_steps:
            life = heapq.heappop(self._decoding)[2]
            self.num_context -= life.request.num_prompt_tokens + life.request.num_output_tokens
            finished.append(life)
        return Ended(computed, finished)

    def num_queued_tokens(self, now: float) -> int:
        """Prompt tokens that are not computed at `now`, as far as whole steps tell."""
        num_left = sum(prompt.num_left for prompt in self.prompts)
        return num_left - (self.stretch.num_ended(now) * self.stretch.prompt_tokens if self.stretch else 0)

    def num_context_at(self, now: float) -> int:
        return self.num_context + self._num_grown(now)

    def num_early_blocks_at(self, now: float) -> int:
        """Blocks that all sequences have, and will need only when they have grown."""
        num_steps = self._num_steps + (self.stretch.num_ended(now) if self.stretch else 0)
        size = self.limits.block_size
        return self.num_early_blocks + sum(
            life.num_early_blocks(size, last_step - num_steps) for last_step, _, life in self._decoding
        )

    def _num_grown(self, now: float) -> int:
        """Tokens by which the contexts have grown in the running stretch."""
        return self.stretch.num_ended(now) * self.stretch.num_decoding if self.stretch else 0

    def _join(self) -> None:
        while self.waiting and len(self._decoding) < self.limits.max_num_seqs:
            life = self.waiting.popleft()
            # It comes with its first token, whose KV the next step computes.
            self.num_context += life.request.num_prompt_tokens + 1
            self.num_early_blocks -= life.num_early_blocks(self.limits.block_size)
            last_step = self._num_steps + life.request.num_output_tokens - 1
            heapq.heappush(self._decoding, (last_step, life.number, life))
            self._fresh.append(life)

    def _plan_chunks(self) -> int:
        """Chooses the chunks of the next steps; how many steps they stay the same (0 without prompts)."""
        self._chunks = []
        if not self.prompts:
            return 0
        block_size = self.limits.block_size
        room = max(min(self.limits.token_budget - len(self._decoding), self.cap), block_size)
        head = self.prompts[0]
        if head.num_left > room:
            chunk = room - room % block_size
            self._chunks = [(head, chunk)]
            # As long as what is left does not fit into one step.
            return -(-(head.num_left - room) // chunk)
        for prompt in self.prompts:
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
        second_token_s = stretch.begin_s + stretch.first_s
        for life in fresh:
            self._itl.add(second_token_s - life.first_token_s)
        self._itl.add(stretch.first_s, stretch.num_decoding - len(fresh))
        if stretch.num_steps > 1:
            self._itl.add_ramp(
                stretch.first_s + stretch.growth_s,
                stretch.growth_s,
                stretch.num_steps - 1,
                stretch.num_decoding,
            )
        if not stretch.prompt_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, stretch.last_s, stretch.num_steps)
        elif stretch.prompt_tokens + stretch.num_decoding >= 16:
            rate = (stretch.prompt_tokens + stretch.num_decoding) / stretch.last_s
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, rate, stretch.num_steps)


def _smooth(old: float, new: float, num_times: int) -> float:
    """As if `new` had been measured so many times in a row."""
    if not old:
        return new
    return new + (old - new) * (1 - SMOOTHING) ** num_times
