"""How much a cluster carries: the highest rate at which its best static split keeps the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulate.run import Machines, simulate, splits_around
from benchmarks.simulate.targets import Targets
from benchmarks.simulate.traffic import at_rate
from benchmarks.traces import Request

# Of all requests, so many have to meet both targets.
GOOD_SHARE = 0.9
# Relative width of the bracket at the end.
PRECISION = 0.03
# Requests per second and node where the search begins, and where it gives up: so few requests that they never
# queue are carried at any rate.
FIRST_RATE = 0.1
LEAST_RATE = 0.001
MOST_RATE = 100.0


class Capacity(NamedTuple):
    """Requests per second, and the number of prefill nodes in the split that carries them."""

    rate: float
    num_prefill: int


def capacity(
    machines: Machines,
    requests: Sequence[Request],
    targets: Targets,
    seed: int = 0,
    policy: str = "static",
    splits: Sequence[int] = (),
) -> Capacity:
    """By bisection over the rate, from the best of `splits` (numbers of prefill nodes; without, of all).

    The rate is 0 when even a crawl misses the targets.
    """
    best = Capacity(0.0, machines.num_nodes // 2)
    too_much: float | None = None
    rate = FIRST_RATE * machines.num_nodes
    while LEAST_RATE < rate / machines.num_nodes < MOST_RATE:
        if too_much is not None and too_much - best.rate <= PRECISION * too_much:
            break
        timed = at_rate(requests, rate, seed)
        tried = splits or splits_around(machines.num_nodes, best.num_prefill)
        found = carrying_split(machines, tried, timed, targets, seed, policy)
        if found is None:
            too_much = rate
        else:
            best = Capacity(rate, found)
        rate = 2 * rate if too_much is None else (best.rate + too_much) / 2
    return best


def carried_by(machines: Machines, requests: Sequence[Request], targets: Targets, seed: int) -> Capacity:
    """The capacity, to load the machines with a share of it. Raises `ValueError` if there is none."""
    carried = capacity(machines, requests, targets, seed)
    if not carried.rate:
        raise ValueError("no split keeps the targets at any rate: there is nothing to take a share of")
    return carried


def carrying_split(
    machines: Machines,
    splits: Sequence[int],
    requests: Sequence[Request],
    targets: Targets,
    seed: int,
    policy: str = "static",
) -> int | None:
    """The first of the splits, as numbers of prefill nodes, that keeps the targets."""
    max_bad = int((1 - GOOD_SHARE) * len(requests))
    for num_prefill in splits:
        if not simulate(machines, num_prefill, policy, requests, targets, seed, max_bad).has_failed:
            return num_prefill
    return None
