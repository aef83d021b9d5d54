"""What all policies of a comparison get: the same machines, the same traffic, the same targets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.simulate.capacity import carried_by
from benchmarks.simulate.presets import PRESETS, with_fit
from benchmarks.simulate.run import Machines, Outcome, best_static, simulate
from benchmarks.simulate.shifting import shifting
from benchmarks.simulate.targets import Targets, default_targets
from benchmarks.simulate.traffic import at_rate, cut_to, own_rate, window
from benchmarks.traces import Request, load, synthetic

BEST_STATIC = "best_static"
MADE_UP = {"synthetic": synthetic, "shifting": shifting}


class Scene(NamedTuple):
    """`likely` is the number of prefill nodes around which the best static split is looked for."""

    machines: Machines
    num_prefill: int
    requests: list[Request]
    targets: Targets
    rate: float
    seed: int
    likely: int


def make_scene(options: argparse.Namespace) -> Scene:
    """Raises `OSError`, `TraceError` or `ValueError` for what the options name wrongly."""
    kind = PRESETS[options.nodes]
    if options.fit:
        kind = with_fit(kind, options.fit)
    num_prefill, num_decode = map(int, options.split.split(":"))
    machines = Machines(kind, num_prefill + num_decode, options.slow_half, options.fit_noise)
    chosen = cut_to(read_window(options.trace, options.requests, options.seed), kind.max_model_len)
    targets = default_targets(kind, chosen)
    targets = Targets(options.ttft or targets.ttft_s, options.tpot or targets.tpot_s)
    rate, likely = options.rate or own_rate(chosen), num_prefill
    if options.load:
        carried = carried_by(machines, chosen, targets, options.seed)
        rate, likely = options.load * carried.rate, carried.num_prefill
    timed = at_rate(chosen, rate, options.seed)
    return Scene(machines, num_prefill, timed, targets, rate, options.seed, likely)


def read_window(trace: str, num_requests: int, seed: int) -> list[Request]:
    """For made-up traffic the seed is that of its generator. Raises as `traces.load`."""
    if trace in MADE_UP:
        return MADE_UP[trace](num_requests, seed)
    return window(load(Path(trace)), num_requests, seed)


def outcome_of(policy: str, scene: Scene) -> Outcome:
    """One of `POLICIES` from the split to start with, or the best static split of all."""
    machines, num_prefill, requests, targets, _, seed, likely = scene
    if policy != BEST_STATIC:
        return simulate(machines, num_prefill, policy, requests, targets, seed)
    outcome = best_static(machines, requests, targets, seed, likely)
    outcome.policy = BEST_STATIC
    return outcome
