"""Which regime the cluster is in, who is lent to the other side, and whether nodes are missing.

The paper names three regimes and publishes neither signs nor thresholds. Ours, with their reasons, are in
docs/scheduling.md. Reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.lending import Lending, Thresholds
from flowkv_scheduler.orders import Order, RegimeChange, ScaleWanted
from flowkv_scheduler.scores import SIDES, Scores, Side, scores_of
from flowkv_scheduler.view import NodeView
from flowkv_scheduler.weighing import Goals

NORMAL, IMBALANCE, OVERLOAD = "normal", "imbalance", "overload"


class Sign(NamedTuple):
    """What one look at the scores says: a regime, and the side that is short of nodes."""

    regime: str
    needy: Side | None = None


class Scaling(msgspec.Struct, frozen=True):
    """Seconds. When the number of nodes is wrong."""

    idle: float = 0.05  # score of both sides
    idle_s: float = 60.0
    every_s: float = 10.0


class Regimes:
    """Called once per period with all usable nodes. The same calls give the same orders."""

    def __init__(self, goals: Goals, thresholds: Thresholds, *, lends: bool = True) -> None:
        self.regime = NORMAL
        self._goals = goals
        self._at = thresholds
        self._scaling = Scaling()
        self._lending = Lending(goals, thresholds) if lends else None
        self._sign = Sign(NORMAL)
        self._num_ticks = 0  # that the sign has lasted
        self._empty_ticks = dict.fromkeys(SIDES, 0)  # that nobody has stood on the side
        self._idle_since: float | None = None
        self._scaled_at = -math.inf
        self._wanted: ScaleWanted | None = None  # as last told, while it stands

    @property
    def leaving(self) -> Mapping[str, Side]:
        """Nodes that shall get nothing new on a side, though their cap would still allow it."""
        return self._lending.leaving if self._lending else {}

    @property
    def lent(self) -> Mapping[NodeRef, Side]:
        return self._lending.lent if self._lending else {}

    def follow(self, registry: Iterable[NodeDescriptor]) -> None:
        """All nodes that live, those that are silent too."""
        if self._lending:
            self._lending.follow(registry)

    def tick(
        self, nodes: Sequence[NodeView], prefill_rate: float, now: float, output_rate: float = 0.0
    ) -> list[Order]:
        """What should change now. Rates are those of `scores_of`."""
        if not nodes:
            return []
        nodes = sorted(nodes, key=lambda node: node.node_id)
        if self._lending:
            self._lending.see(nodes, now)
        scores = scores_of(nodes, self._goals, prefill_rate, output_rate)
        orders = self._change_regime(nodes, scores)
        if self._lending:
            lasting = self._sign.needy if self._num_ticks >= self._at.num_ticks else None
            needy = lasting if self._sign.regime == IMBALANCE else None
            if self._lending.move(nodes, scores, needy, self._empty_sides(scores), now):
                self._num_ticks = 0  # see what that does before the next move
            orders += self._lending.orders(nodes, self.regime)
        return orders + self._scale(scores, now)

    def _change_regime(self, nodes: Sequence[NodeView], scores: Scores) -> list[Order]:
        """A sign must last for some ticks, on the way in and on the way out."""
        sign = sign_of(nodes, scores, self._at)
        self._num_ticks = self._num_ticks + 1 if sign == self._sign else 1
        self._sign = sign
        if self._num_ticks < self._at.num_ticks or sign.regime == self.regime:
            return []
        before, self.regime = self.regime, sign.regime
        short = f", {sign.needy} is short of nodes" if sign.needy else ""
        return [RegimeChange(before, sign.regime, f"for {self._at.num_ticks} reports: {scores}{short}")]

    def _empty_sides(self, scores: Scores) -> list[Side]:
        """Those on which nobody has stood for some ticks: while nodes start, one side is often first."""
        for side in SIDES:
            self._empty_ticks[side] = 0 if scores.of(side).num_nodes else self._empty_ticks[side] + 1
        return [side for side, num_ticks in self._empty_ticks.items() if num_ticks >= self._at.num_ticks]

    # --- scaling -----------------------------------------------------------------------------------

    def _scale(self, scores: Scores, now: float) -> list[Order]:
        if scores.worst >= self._scaling.idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        is_due = now - self._scaled_at >= self._scaling.every_s
        order = (self._more(scores) or self._fewer(scores, now)) if is_due else None
        orders: list[Order] = []
        before = self._wanted
        if before and (order.role != before.role if order else self._has_ended(before, scores, now)):
            orders.append(before._replace(change=0, reason=str(scores)))
            self._wanted = None
        if order:
            orders.append(order)
            self._wanted, self._scaled_at = order, now
        return orders

    def _has_ended(self, wanted: ScaleWanted, scores: Scores, now: float) -> bool:
        """The need for what was wanted. Overload goes late enough by itself: see `_change_regime`."""
        return self.regime != OVERLOAD if wanted.change > 0 else self._fewer(scores, now) is None

    def _more(self, scores: Scores) -> ScaleWanted | None:
        """As many nodes of the side that is short as would do all of its work, at most twice as many."""
        side = self._sign.needy
        if self.regime != OVERLOAD or side is None or not scores.of(side).num_nodes:
            return None
        num = scores.of(side).num_nodes
        change = math.ceil(num * scores.of(side).pressure) - num
        return ScaleWanted(side, max(1, min(change, num)), str(scores))

    def _fewer(self, scores: Scores, now: float) -> ScaleWanted | None:
        if self._idle_since is None or now - self._idle_since < self._scaling.idle_s:
            return None
        side = max(SIDES, key=lambda side: scores.of(side).num_nodes)
        if scores.of(side).num_nodes < 2:
            return None
        return ScaleWanted(side, -1, f"idle for {self._scaling.idle_s:.0f} s: {scores}")


def sign_of(nodes: Sequence[NodeView], scores: Scores, at: Thresholds) -> Sign:
    """Imbalance is a need that the other side can ease without getting into such need itself."""
    if scores.worst <= at.calm:
        return Sign(NORMAL)
    side = max(SIDES, key=lambda side: scores.of(side).pressure)
    lenders = [node for node in nodes if not (node.may_prefill if side == "prefill" else node.may_decode)]
    if any(scores.eased_by(node, side, at.gain) for node in lenders):
        return Sign(IMBALANCE, side)
    return Sign(OVERLOAD, side) if scores.worst > 1.0 else Sign(NORMAL)
