"""How much a cluster carries: the highest rate at which its best static split keeps the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulate.run import Machines, num_good, simulate
from benchmarks.simulate.targets import Targets
from benchmarks.simulate.traffic import at_rate
from benchmarks.traces import Request

# Of all requests, so many have to meet both targets.
GOOD_SHARE = 0.9
# Relative width of the bracket at the end.
PRECISION = 0.03


class Capacity(NamedTuple):
    """Requests per second, and the prefill nodes of the split that carries them."""

    rate: float
    num_prefill: int


def capacity(machines: Machines, requests: Sequence[Request], targets: Targets, seed: int = 0) -> Capacity:
    """By bisection over the rate. 0 when even a crawl misses the targets."""
    splits = list(range(1, machines.num_nodes))
    splits.sort(key=lambda num_prefill: abs(2 * num_prefill - machines.num_nodes))
    low, high = Capacity(0.0, splits[0]), 0.05 * machines.num_nodes
    while (
        found := carrying_split(machines, splits, at_rate(requests, high, seed), targets, seed)
    ) is not None:
        low, high = Capacity(high, found), 2 * high
        splits.sort(key=lambda num_prefill: abs(num_prefill - low.num_prefill))
    while high - low.rate > PRECISION * high and high > 1e-3:
        middle = (low.rate + high) / 2
        found = carrying_split(machines, splits, at_rate(requests, middle, seed), targets, seed)
        if found is None:
            high = middle
        else:
            low = Capacity(middle, found)
            splits.sort(key=lambda num_prefill: abs(num_prefill - low.num_prefill))
    return low


def carrying_split(
    machines: Machines, splits: Sequence[int], requests: Sequence[Request], targets: Targets, seed: int
) -> int | None:
    """The first of the splits, as numbers of prefill nodes, that keeps the targets."""
    for num_prefill in splits:
        outcome = simulate(machines, num_prefill, "static", requests, targets, seed)
        if num_good(outcome) >= GOOD_SHARE * len(requests):
            return num_prefill
    return None
