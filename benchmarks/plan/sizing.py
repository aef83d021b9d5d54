"""The smallest cluster that keeps the targets at a rate, by simulation and bisection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulate.capacity import carrying_split
from benchmarks.simulate.presets import NodeKind
from benchmarks.simulate.run import Machines
from benchmarks.simulate.targets import Targets
from benchmarks.simulate.traffic import at_rate
from benchmarks.traces import Request

# Relative precision of the margin, and the greatest that is looked for.
MARGIN_PRECISION = 0.02
MAX_MARGIN = 1.0


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

    def price(self, prices: dict[str, float]) -> float:
        """What the nodes cost, by the prices of their kinds; 1 where none is given."""
        prefill, decode = (prices.get(kind.name, 1.0) for kind in self.kinds)
        return self.num_prefill * prefill + self.num_decode * decode


def smallest(kinds: Kinds, demand: Demand, max_nodes: int) -> Size | None:
    """The fewest nodes that keep the targets for as many requests as `capacity.GOOD_SHARE` asks; None when
    `max_nodes` don't. Takes it that more nodes carry no less."""
    timed = at_rate(demand.requests, demand.rate, demand.seed)
    too_few, enough, split, num_nodes = 1, max_nodes + 1, 0, 2
    while enough - too_few > 1:
        likely = max(1, round(split / enough * num_nodes)) if split else num_nodes // 2
        found = carrying_split(
            kinds.machines(num_nodes), likely, timed, demand.targets, demand.seed, demand.policy
        )
        if found is None:
            too_few = num_nodes
        else:
            enough, split = num_nodes, found
        num_nodes = (too_few + enough) // 2 if split else min(2 * num_nodes, max_nodes)
    if not split:
        return None
    return Size(kinds, split, enough - split, margin(kinds, enough, split, demand))


def margin(kinds: Kinds, num_nodes: int, num_prefill: int, demand: Demand) -> float:
    """How much more of the same traffic the split carries, up to `MAX_MARGIN`."""
    low, high = 0.0, MAX_MARGIN
    while high - low > MARGIN_PRECISION:
        middle = (low + high) / 2
        timed = at_rate(demand.requests, demand.rate * (1 + middle), demand.seed)
        found = carrying_split(
            kinds.machines(num_nodes),
            num_prefill,
            timed,
            demand.targets,
            demand.seed,
            demand.policy,
            only_likely=True,
        )
        low, high = (low, middle) if found is None else (middle, high)
    return low
