"""The smallest cluster that keeps the targets at a rate, by simulation and bisection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulate.capacity import carrying_split
from benchmarks.simulate.presets import NodeKind
from benchmarks.simulate.run import Machines, splits_around
from benchmarks.simulate.targets import Targets
from benchmarks.simulate.traffic import at_rate
from benchmarks.traces import Request

# Relative precision of the margin, and the greatest that is looked for.
MARGIN_PRECISION = 0.02
MAX_MARGIN = 1.0
# While nothing carries the traffic, splits are tried in steps of an eighth; then within a sixth of the last.
COARSE_PARTS = 8
NEAR_SHARE = 6


class Kinds(NamedTuple):
    """What prefill nodes are, and what decode nodes are."""

    prefill: NodeKind
    decode: NodeKind

    def machines(self, num_nodes: int, *, slow_half: bool = False) -> Machines:
        return Machines(self.prefill, num_nodes, slow_half, decode_kind=self.decode)


class Demand(NamedTuple):
    """The traffic and what its users are to see."""

    requests: Sequence[Request]
    rate: float
    targets: Targets
    seed: int
    policy: str


class Size(NamedTuple):
    """`margin` is how much more traffic the same nodes, split the same way, would carry: 0.1 is 10 %."""

    kinds: Kinds
    num_prefill: int
    num_decode: int
    margin: float

    @property
    def num_nodes(self) -> int:
        return self.num_prefill + self.num_decode

    def price(self, prices: dict[str, float]) -> float:
        """What the nodes cost, by the prices of their kinds; 1 where none is given."""
        prefill, decode = (prices.get(kind.name, 1.0) for kind in self.kinds)
        return self.num_prefill * prefill + self.num_decode * decode


def smallest(kinds: Kinds, demand: Demand, max_nodes: int) -> Size | None:
    """The fewest nodes that keep the targets for as many requests as `capacity.GOOD_SHARE` asks; None when
    `max_nodes` don't. Takes it that more nodes carry no less, and that good splits have like proportions."""
    timed = at_rate(demand.requests, demand.rate, demand.seed)
    too_few, best, num_nodes = 1, None, 2
    while too_few < max_nodes and (best is None or best.num_nodes - too_few > 1):
        splits = splits_to_try(num_nodes, best.num_prefill / best.num_nodes if best else None)
        machines = kinds.machines(num_nodes)
        found = carrying_split(machines, splits, timed, demand.targets, demand.seed, demand.policy)
        if found is None:
            too_few = num_nodes
        else:
            best = Size(kinds, found, num_nodes - found, 0.0)
        num_nodes = (too_few + best.num_nodes) // 2 if best else min(2 * num_nodes, max_nodes)
    return best._replace(margin=margin(best, demand)) if best else None


def splits_to_try(num_nodes: int, share: float | None) -> list[int]:
    """Numbers of prefill nodes: near their share in a larger cluster, if known; else a few from all over."""
    if share is not None:
        width = max(1, num_nodes // NEAR_SHARE)
        near = splits_around(num_nodes, round(share * num_nodes))
        return [split for split in near if abs(split - share * num_nodes) <= width]
    coarse = {round(num_nodes * part / COARSE_PARTS) for part in range(1, COARSE_PARTS)}
    return [split for split in splits_around(num_nodes, num_nodes // 2) if split in coarse]


def margin(size: Size, demand: Demand) -> float:
    """How much more of the same traffic the split carries, up to `MAX_MARGIN`."""
    machines = size.kinds.machines(size.num_nodes)
    low, high = 0.0, MAX_MARGIN
    while high - low > MARGIN_PRECISION:
        middle = (low + high) / 2
        timed = at_rate(demand.requests, demand.rate * (1 + middle), demand.seed)
        found = carrying_split(
            machines, [size.num_prefill], timed, demand.targets, demand.seed, demand.policy
        )
        low, high = (low, middle) if found is None else (middle, high)
    return low
