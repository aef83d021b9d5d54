"""What holds for a node's fit, whatever its steps cost and however they mix."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_common.wire.nodes import StepFit
from flowkv_node.measures import StepCounts, StepFitter
from tests.made_steps import duration_s, make_step, run_steps, worst_error

# From a GPU to a slow core; some parts cost nothing. A step is never free.
costs = st.builds(
    StepFit,
    base_s=st.floats(1e-3, 0.1),
    prefill_token_s=st.just(0.0) | st.floats(1e-6, 1e-2),
    attended_token_s=st.just(0.0) | st.floats(1e-9, 1e-6),
    sequence_s=st.just(0.0) | st.floats(1e-6, 1e-2),
    context_token_s=st.just(0.0) | st.floats(1e-9, 1e-5),
)
counts = st.builds(
    StepCounts, st.integers(0, 8192), st.integers(0, 10**9), st.integers(0, 512), st.integers(0, 10**7)
)


@settings(deadline=None, max_examples=40, derandomize=True)  # an error has no sharp bound
@given(costs, st.integers(0, 1000))
def test_known_costs_are_recovered(truth: StepFit, seed: int) -> None:
    fitter, rng = StepFitter(), random.Random(seed)
    run_steps(fitter, 300, rng, costs=truth, noise=0.02)
    assert fitter.fit() is not None
    assert worst_error(fitter, rng, costs=truth) < 0.05


@settings(deadline=None, max_examples=40, derandomize=True)  # an error has no sharp bound
@given(costs, costs, st.integers(0, 1000))
def test_any_change_is_followed(before: StepFit, after: StepFit, seed: int) -> None:
    fitter, rng = StepFitter(), random.Random(seed)
    run_steps(fitter, 200, rng, costs=before)
    run_steps(fitter, 1000, rng, costs=after)
    fitter.fit()
    assert worst_error(fitter, rng, costs=after) < 0.1


@settings(deadline=None)
@given(st.lists(st.tuples(counts, st.floats(0.0, 100.0)), min_size=10, max_size=60))
def test_no_cost_is_ever_negative_or_no_number(steps: list[tuple[StepCounts, float]]) -> None:
    fitter = StepFitter()
    for step, took_s in steps:
        fitter.observe(step, took_s)
        assert 0.0 <= fitter.predict(step) < float("inf")
    told = fitter.fit()
    assert told is not None
    for cost in msgspec.structs.astuple(told):
        assert 0.0 <= cost < float("inf")


@settings(deadline=None, max_examples=40, derandomize=True)  # an error has no sharp bound
@given(costs, st.integers(0, 1000), st.floats(10.0, 1000.0))
def test_an_outlier_is_ignored(truth: StepFit, seed: int, factor: float) -> None:
    fitter, rng = StepFitter(), random.Random(seed)
    run_steps(fitter, 300, rng, costs=truth, noise=0.02)
    step = make_step(rng)
    fitter.observe(step, factor * duration_s(truth, step))
    assert worst_error(fitter, rng, costs=truth) < 0.2
