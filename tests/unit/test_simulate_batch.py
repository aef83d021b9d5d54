"""Stretches in closed form against a node that takes one step at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulator.batch import BUCKET_WIDTH, Batch, Histogram, Life, Limits, Prompt, Stretch
from flowkv.bench.traces import Request
from flowkv_common.wire.nodes import StepFit

# Costs are multiples of it: sums are exact, in whatever order they are made.
TICK_S = 2.0**-20
LIMITS = Limits(block_size=4, token_budget=32, max_num_seqs=3)


class Event(NamedTuple):
    """Something happens to the node: a prompt, a sequence, another cap, or its pool is full."""

    at_s: float
    prompt: tuple[int, int] | None = None  # tokens, those of them that are cached
    sequence: tuple[int, int] | None = None  # tokens of the prompt and of the answer
    cap: int | None = None
    is_full: bool = False  # the newest sequence gives way, and is computed again as a prompt


def events() -> st.SearchStrategy[list[Event]]:
    # Never on the border of a step: which of two things is first at one moment is not the matter here.
    times = st.integers(0, 2_000).map(lambda n: n * 1024 * TICK_S + TICK_S / 4)
    prompts = st.tuples(st.integers(1, 200), st.integers(0, 10)).map(
        lambda p: (p[0], min(4 * p[1], (p[0] - 1) // 4 * 4))
    )
    sequences = st.tuples(st.integers(1, 50), st.integers(2, 40))
    kinds = st.one_of(
        st.tuples(times, prompts).map(lambda drawn: Event(drawn[0], prompt=drawn[1])),
        st.tuples(times, sequences).map(lambda drawn: Event(drawn[0], sequence=drawn[1])),
        st.tuples(times, st.integers(1, 40)).map(lambda drawn: Event(drawn[0], cap=drawn[1])),
        times.map(lambda at_s: Event(at_s, is_full=True)),
    )
    return st.lists(kinds, max_size=12).map(lambda found: sorted(found, key=lambda event: event.at_s))


def fits() -> st.SearchStrategy[StepFit]:
    cost = st.integers(0, 300).map(lambda n: n * TICK_S)
    return st.builds(
        StepFit,
        base_s=st.integers(1, 20_000).map(lambda n: n * TICK_S),
        prefill_token_s=cost,
        attended_token_s=st.integers(0, 5).map(lambda n: n * TICK_S),
        sequence_s=cost,
        context_token_s=cost,
    )


def by_stretches(
    fit: StepFit, happened: Sequence[Event], num_free_tokens: int = 10_000
) -> tuple[list[tuple[str, int, float]], Batch]:
    """What ended when, as the simulator has it."""
    batch = Batch(fit, LIMITS, cap=32, itl=Histogram())
    ends: list[tuple[str, int, float]] = []
    num_full = 0

    def run_until(now: float) -> None:
        nonlocal num_full
        while batch.stretch is not None and batch.stretch.end_s < now:
            at = batch.stretch.end_s
            prompts, sequences = batch.end()
            ends.extend(("sequence", life.number, at) for life in sequences)
            ends.extend(("prompt", prompt.life.number, at) for prompt in prompts)
            assert all(life.num_produced == life.request.num_output_tokens for life in sequences)
            batch.waiting.extend(prompt.life for prompt in prompts if prompt.life.num_produced)
            for _ in range(min(num_full, batch.num_decoding)):
                life = batch.preempt_newest(at)
                num_tokens = life.request.num_prompt_tokens + life.num_produced
                batch.prompts.append(Prompt(life, num_tokens, 0))
            num_full = 0
            batch.begin(at, num_free_tokens)

    for number, event in enumerate(happened):
        run_until(event.at_s)
        if event.prompt:
            life = Life(number, Request(event.prompt[0], 1))
            batch.prompts.append(Prompt(life, event.prompt[0], event.prompt[1]))
        elif event.sequence:
            life = Life(number, Request(*event.sequence), num_produced=1, newest_token_s=event.at_s)
            batch.waiting.append(life)
        elif event.is_full:
            num_full += batch.stretch is not None
        else:
            assert event.cap is not None
            batch.cap = event.cap
        if batch.stretch is None:
            batch.begin(event.at_s, num_free_tokens)
        else:
            batch.cut(event.at_s)
    run_until(math.inf)
    return ends, batch


class Steps:
    """The same node, naively: one step, then a look at what has happened meanwhile."""

    def __init__(self, fit: StepFit) -> None:
        self.fit = fit
        self.cap = 32
        self.prompts: list[list[int]] = []  # number, tokens, computed
        self.waiting: list[list[int]] = []  # number, context, tokens to come
        self.decoding: list[list[int]] = []
        self.preempted: dict[int, list[int]] = {}  # by number, while they are prompts again
        self.num_steps = 0
        self.joined_at: dict[int, int] = {}
        self.num_intervals = 0

    def apply(self, number: int, event: Event) -> None:
        if event.prompt:
            self.prompts.append([number, *event.prompt])
        elif event.sequence:
            self.waiting.append([number, event.sequence[0] + 1, event.sequence[1] - 1])
        elif event.cap is not None:
            self.cap = event.cap

    def preempt(self) -> None:
        """Takes the sequence that joined last out; of those that joined together, the latest request."""
        if self.decoding:
            newest = max(self.decoding, key=lambda sequence: (self.joined_at[sequence[0]], sequence[0]))
            self.decoding.remove(newest)
            self.preempted[newest[0]] = newest
            self.prompts.append([newest[0], newest[1], 0])

    def step(self, now: float) -> tuple[float, list[tuple[str, int, float]]]:
        """One step that begins now: when it ends, and what ends with it."""
        while self.waiting and len(self.decoding) < LIMITS.max_num_seqs:
            self.decoding.append(self.waiting.pop(0))
            self.joined_at[self.decoding[-1][0]] = self.num_steps
        self.num_steps += 1
        duration_s = self.fit.base_s
        for _, context, _ in self.decoding:
            duration_s += self.fit.sequence_s + self.fit.context_token_s * context
        room = max(min(LIMITS.token_budget - len(self.decoding), self.cap), LIMITS.block_size)
        for prompt in self.prompts:
            _, num_tokens, num_computed = prompt
            chunk = min(num_tokens - num_computed, room)
            if num_computed + chunk < num_tokens:
                chunk -= (num_computed + chunk) % LIMITS.block_size
            duration_s += self.fit.prefill_token_s * chunk
            duration_s += self.fit.attended_token_s * sum(range(num_computed + 1, num_computed + chunk + 1))
            prompt[2] += chunk
            room -= chunk
            if prompt[2] < num_tokens:
                break
        at = now + duration_s
        for sequence in self.decoding:
            sequence[1] += 1
            sequence[2] -= 1
        self.num_intervals += len(self.decoding)
        ended = [("sequence", number, at) for number, _, left in sorted(self.decoding) if not left]
        ended += [("prompt", number, at) for number, tokens, computed in self.prompts if tokens == computed]
        self.decoding = [sequence for sequence in self.decoding if sequence[2]]
        self.prompts = [prompt for prompt in self.prompts if prompt[1] > prompt[2]]
        return at, ended


def by_steps(fit: StepFit, happened: Sequence[Event]) -> tuple[list[tuple[str, int, float]], Steps]:
    node, ends, now = Steps(fit), [], 0.0
    left = list(enumerate(happened))
    while left or node.prompts or node.waiting or node.decoding:
        if not (node.prompts or node.waiting or node.decoding):
            number, event = left.pop(0)  # an idle node begins at once, with what there is
            now = event.at_s
            node.apply(number, event)
            continue
        now, ended = node.step(now)
        ends += ended
        meanwhile = [(number, event) for number, event in left if event.at_s <= now]
        left = left[len(meanwhile) :]
        for number, event in meanwhile:
            node.apply(number, event)
        node.waiting += (
            node.preempted.pop(n) for kind, n, _ in ended if kind == "prompt" and n in node.preempted
        )
        for _ in range(sum(event.is_full for _, event in meanwhile)):
            node.preempt()
    return ends, node


@settings(max_examples=100, deadline=None)
@given(fits(), events(), st.integers(0, 100))
def test_stretches_end_when_steps_do(fit: StepFit, happened: list[Event], num_free_tokens: int) -> None:
    """Also where they are short, since sequences find little room to grow, and where some lose theirs."""
    ends, batch = by_stretches(fit, happened, num_free_tokens)
    expected, node = by_steps(fit, happened)
    assert ends == expected
    assert batch._itl.total() == node.num_intervals
    assert (batch.num_context, batch.num_grown, batch.num_decoding, len(batch.prompts)) == (0, 0, 0, 0)


STEADY = StepFit(base_s=1.0, prefill_token_s=0.0, attended_token_s=0.0, sequence_s=0.0, context_token_s=0.0)


def decoding(*num_output_tokens: int) -> Batch:
    """A batch whose sequences have waited to join it, all with prompts of ten tokens."""
    batch = Batch(STEADY, LIMITS, cap=4, itl=Histogram())
    for number, num_tokens in enumerate(num_output_tokens):
        request = Request(10, num_tokens, max_tokens=100)
        batch.waiting.append(Life(number, request, num_produced=1, newest_token_s=-1.0))
    return batch


@pytest.mark.parametrize(("num_free_tokens", "num_steps"), [(0, 1), (2, 1), (11, 5), (200, 29)])
def test_a_stretch_is_as_long_as_sequences_find_room_to_grow(num_free_tokens: int, num_steps: int) -> None:
    stretch = decoding(30, 40).begin(0.0, num_free_tokens)
    assert stretch is not None
    assert stretch.num_steps == num_steps


def test_what_sequences_have_grown_is_told_within_a_stretch_too() -> None:
    batch = decoding(30, 40)
    batch.begin(0.0, 1000)
    assert (batch.num_context, batch.num_grown) == (22, 2)
    assert (batch.num_context_at(5.5), batch.num_grown_at(5.5)) == (32, 12)
    assert sorted(batch.outputs_at(5.5)) == [(10, 6, 94)] * 2
    batch.cut(5.5)
    batch.end()
    assert (batch.num_context, batch.num_grown) == (34, 14)


def test_one_that_was_preempted_comes_back_with_what_it_has_and_counts_its_pause() -> None:
    batch = decoding(30, 40)
    batch.begin(0.0, 10)
    batch.end()
    life = batch.preempt_newest(5.0)
    assert (life.number, life.num_produced, life.newest_token_s) == (1, 6, 5.0)
    assert (batch.num_context, batch.num_grown, batch.num_decoding) == (16, 6, 1)
    batch.begin(5.0, 10)
    batch.end()
    batch.waiting.append(life)
    batch.begin(15.0, 10)
    assert (batch.num_context, batch.num_grown) == (16 + 10 + 16, 16 + 6)
    batch.end()
    assert life.num_produced == 6  # when it joined: it is told again when it leaves
    assert batch.preempt_newest(20.0).num_produced == 11
    # Between its sixth token at 5 s and its seventh at 16 s: no other interval is as long.
    assert batch._itl.quantile(1.0) == pytest.approx(11.0, rel=BUCKET_WIDTH)
    assert batch._itl.total() == 5 + 5 + 10 + 5 + 5


@given(
    st.integers(1, 1_000),
    st.integers(0, 50),
    st.integers(1, 300),
    st.integers(0, 400_000).map(lambda n: n + 0.5),
)
def test_steps_started_and_ended_are_those_before_and_after(
    first: int, growth: int, num_steps: int, now: float
) -> None:
    stretch = Stretch(0.0, float(first), float(growth), num_steps, 1, 0)
    borders = [sum(first + j * growth for j in range(k)) for k in range(num_steps + 1)]
    assert [stretch.after(k) for k in range(num_steps + 1)] == borders
    assert stretch.num_ended(now) == sum(border <= now for border in borders[1:])
    assert stretch.num_started(now) == min(num_steps, stretch.num_ended(now) + 1)


def test_a_step_that_ends_just_now_needs_no_other() -> None:
    stretch = Stretch(0.0, 1.0, 0.5, 10, 1, 0)
    assert [stretch.num_started(at) for at in (0.0, 1.0, 1.25, 2.5, 99.0)] == [1, 1, 2, 2, 10]


@given(
    st.floats(1e-4, 10),
    st.floats(0, 0.1),
    st.integers(1, 300),
    st.integers(1, 5),
    st.sampled_from([0.1, 0.5, 0.99]),
)
def test_a_ramp_counts_as_its_values_do(
    first: float, growth: float, num: int, weight: int, part: float
) -> None:
    at_once, singly = Histogram(), Histogram()
    at_once.add_ramp(first, growth, num, weight)
    for j in range(num):
        singly.add_value(first + j * growth, weight)
    assert at_once.total() == singly.total() == num * weight
    exact = first + (math.ceil(part * num) - 1) * growth
    assert at_once.quantile(part) == pytest.approx(exact, rel=BUCKET_WIDTH)
    assert singly.quantile(part) == pytest.approx(exact, rel=BUCKET_WIDTH)


def test_a_prompt_behind_one_that_fills_the_steps_waits_for_its_end() -> None:
    ends, _ = by_stretches(STEADY, [Event(0.0, prompt=(100, 0)), Event(0.5, prompt=(10, 0))])
    # 32 + 32 + 32, then the last 4 of the first and all of the second in one step.
    assert ends == [("prompt", 0, 4.0), ("prompt", 1, 4.0)]
