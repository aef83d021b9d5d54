"""A node learns what its steps cost, whatever it happens to run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flowkv_common.wire.nodes import StepFit
from flowkv_engine.engine.batch import WorkItem
from flowkv_node.measures import MIN_STEPS, StepCounts, StepFitter
from tests.drive import make_sequence
from tests.made_steps import COSTS, duration_s, make_step, run_steps, worst_error

RNG_SEED = 3


def only(kinds: str) -> Callable[[random.Random], StepCounts]:
    return lambda rng: make_step(rng, kinds)


def times(costs: StepFit, factor: float) -> StepFit:
    return StepFit(**{name: factor * cost for name, cost in msgspec.structs.asdict(costs).items()})


def taught(num_steps: int = 400, **kwargs: Any) -> tuple[StepFitter, random.Random]:
    fitter, rng = StepFitter(), random.Random(RNG_SEED)
    run_steps(fitter, num_steps, rng, **kwargs)
    return fitter, rng


def test_counts_of_a_step() -> None:
    prompt, tail, decoding = (make_sequence([7] * 100) for _ in range(3))
    prompt.num_computed_tokens = 10
    tail.num_computed_tokens = 99  # the last token of a prompt costs what decoding one does
    decoding.num_computed_tokens = 50
    counts = StepCounts.of([WorkItem(prompt, 4), WorkItem(tail, 1), WorkItem(decoding, 1)])
    assert counts == StepCounts(
        num_prefill_tokens=4, num_attended=11 + 12 + 13 + 14, num_sequences=2, num_context_tokens=99 + 50
    )


def test_nothing_is_told_before_enough_steps() -> None:
    fitter, rng = taught(MIN_STEPS - 1)
    assert fitter.fit() is None
    run_steps(fitter, 1, rng)
    assert fitter.fit() is not None


def test_what_is_told_is_what_is_predicted() -> None:
    fitter, rng = taught()
    told = fitter.fit()
    assert told is not None
    for _ in range(20):
        counts = make_step(rng)
        assert duration_s(told, counts) == pytest.approx(fitter.predict(counts))


def test_mixes_that_were_not_seen_are_predicted() -> None:
    fitter, rng = taught()
    assert worst_error(fitter, rng) < 0.05


@pytest.mark.parametrize("kinds", ["p", "d"])
def test_one_kind_of_steps_alone_is_learned(kinds: str) -> None:
    fitter, rng = taught(make=only(kinds))
    assert worst_error(fitter, rng, make=only(kinds)) < 0.05
    told = fitter.fit()
    assert told is not None
    unknown = (told.sequence_s, told.context_token_s) if kinds == "p" else (told.prefill_token_s,)
    assert set(unknown) == {0.0}


@pytest.mark.parametrize("counts", [StepCounts(512, 131_328, 0, 0), StepCounts(0, 0, 1, 100)], ids=str)
def test_steps_that_look_all_alike_share_their_time(counts: StepCounts) -> None:
    fitter, _ = taught(make=lambda _: counts, noise=0.0)
    assert fitter.predict(counts) == pytest.approx(duration_s(COSTS, counts), rel=0.01)
    # Half of it is not taken for the price of any step, nor for that of a token.
    half = StepCounts(*(count // 2 for count in counts))
    assert 0.3 < fitter.predict(half) / fitter.predict(counts) < 0.95


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_another_speed_of_the_hardware_is_followed(factor: float) -> None:
    fitter, rng = taught()
    run_steps(fitter, 300, rng, costs=times(COSTS, factor))
    assert worst_error(fitter, rng, costs=times(COSTS, factor)) < 0.1


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_an_outlier_changes_next_to_nothing(factor: float) -> None:
    fitter, rng = taught()
    before = fitter.fit()
    counts = make_step(rng)
    fitter.observe(counts, factor * duration_s(COSTS, counts))
    assert before is not None
    for _ in range(20):
        counts = make_step(rng)
        assert fitter.predict(counts) == pytest.approx(duration_s(before, counts), rel=0.05)


def test_a_first_step_that_compiles_is_soon_forgotten() -> None:
    fitter, rng = StepFitter(), random.Random(RNG_SEED)
    fitter.observe(make_step(rng), 100 * COSTS.base_s)
    run_steps(fitter, 50, rng)
    assert worst_error(fitter, rng) < 0.1


def test_costs_outlive_a_time_without_such_steps() -> None:
    """A node is lent to decode, and its hardware slows down meanwhile."""
    fitter, rng = taught()
    before = fitter.fit()
    run_steps(fitter, 2000, rng, costs=times(COSTS, 3), make=only("d"))
    after = fitter.fit()
    assert before is not None
    assert after is not None
    assert after.prefill_token_s == before.prefill_token_s
    assert after.attended_token_s == before.attended_token_s
    assert worst_error(fitter, rng, costs=times(COSTS, 3), make=only("d")) < 0.05
    # What comes then is learned at once, not after the memory's length.
    run_steps(fitter, 30, rng, costs=times(COSTS, 3), make=only("pd"))
    assert worst_error(fitter, rng, costs=times(COSTS, 3)) < 0.1


def test_one_step_costs_microseconds() -> None:
    """About as much as to add two thousand numbers: 20 us where that takes 14 us."""
    fitter, rng = taught()
    steps = [(make_step(rng), rng.uniform(0.02, 0.5)) for _ in range(1000)]
    began = time.process_time()
    for counts, took_s in steps:
        fitter.observe(counts, took_s)
    middle = time.process_time()
    for _ in steps:
        sum(range(1000))
    assert middle - began < 6 * (time.process_time() - middle)
