"""Which regime the cluster is in, who is lent to the other side, and whether nodes are missing.

The paper names three regimes and publishes neither signs nor thresholds. Ours, with their reasons, are in
docs/scheduling.md. Lending moves a node's prefill cap, nothing else. Reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from flowkv_common.wire.messages import NodeDescriptor, NodeRef
from flowkv_scheduler.orders import MoveCap, Order, RegimeChange, ScaleWanted
from flowkv_scheduler.policy import Goals
from flowkv_scheduler.state import NodeView

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")
NORMAL, IMBALANCE, OVERLOAD = "normal", "imbalance", "overload"


class Thresholds(msgspec.Struct, frozen=True):
    """Scores are 0 when idle and 1 at the goal. Ticks are calls of `Regimes.tick`, seconds are seconds."""

    high: float = 0.5
    low: float = 0.4
    back: float = 0.15  # a needy side is well again
    num_ticks: int = 3
    dwell_s: float = 10.0  # what was moved stays so long
    idle: float = 0.05
    idle_s: float = 60.0
    scale_every_s: float = 10.0
    # A lent node computes as many prompt tokens as this part of the inter-token goal leaves.
    rhythm_share: float = 0.8
    recap_ratio: float = 1.25  # a lent node's cap is adjusted when it is off by so much
    lent_at_once: float = 0.25  # of the lending side, at least one


class Scores(NamedTuple):
    """Mean over the nodes of each side; infinite where a side has none."""

    prefill: float
    decode: float
    num_prefill: int
    num_decode: int

    def of(self, side: Side) -> float:
        return self.prefill if side == "prefill" else self.decode

    def num(self, side: Side) -> int:
        return self.num_prefill if side == "prefill" else self.num_decode

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:.2f} on {self.num_prefill}, decode {self.decode:.2f} on {self.num_decode}"
        )


class Moved(NamedTuple):
    """A node whose cap we have set: at home again, or lent `to` the other side."""

    cap: int
    since: float
    to: Side | None


def prefill_score(node: NodeView, goals: Goals) -> float:
    """Waiting may use half of the time to the first token: then the score is 1."""
    return node.prefill_wait_s / (goals.ttft_s / 2)


def decode_score(node: NodeView, goals: Goals) -> float:
    """How far the node is from idle (0) to its limit (1), in rhythm, room or places, whichever is nearest."""
    one_s = node.speed.decode_step_s(1, 0)
    now_s = node.speed.decode_step_s(max(1, node.num_sequences), node.num_context_tokens)
    rhythm = (now_s - one_s) / (goals.itl_s - one_s) if goals.itl_s > one_s else 0.0
    blocks = node.report.blocks
    room = (blocks.leased + blocks.quarantined + node.given.num_blocks) / max(1, blocks.total)
    places = node.num_sequences / max(1, node.report.max_num_seqs)
    return max(rhythm, room, places)


def home_cap(descriptor: NodeDescriptor) -> int:
    """The cap that the node was started with: see `flowkv_common.node.host.prefill_cap`."""
    block_size, budget = descriptor.layout.block_size, descriptor.token_budget
    return {"prefill": budget, "decode": block_size}.get(descriptor.role, max(block_size, budget // 2))


class Regimes:
    """Called once per period with all usable nodes; remembers what it has moved, and when."""

    def __init__(self, goals: Goals, thresholds: Thresholds, *, lends: bool = True) -> None:
        self.regime = NORMAL
        self.moved: dict[NodeRef, Moved] = {}
        self._goals = goals
        self._at = thresholds
        self._lends = lends
        self._num_ticks: dict[str, int] = {}
        self._idle_since: float | None = None
        self._scaled_at = -math.inf

    def tick(self, nodes: Sequence[NodeView], now: float) -> list[Order]:
        """What should change now. The same calls give the same orders."""
        nodes = sorted(nodes, key=lambda node: node.node_id)
        self._adopt(nodes, now)
        scores = self._scores(nodes)
        orders = self._change_regime(scores)
        if self._lends:
            self._lend(nodes, scores, now)
            self._take_back(nodes, scores, now)
            self._keep_rhythm(nodes)
            orders += self._cap_orders(nodes)
        return orders + self._scale(scores, now)

    # --- looking -----------------------------------------------------------------------------------

    def _adopt(self, nodes: Sequence[NodeView], now: float) -> None:
        """Forget lives that ended; take over what a leader before us has lent."""
        present = {node.descriptor.node for node in nodes}
        self.moved = {ref: moved for ref, moved in self.moved.items() if ref in present}
        for node in nodes:
            home = home_cap(node.descriptor)
            if node.cap != home and node.descriptor.node not in self.moved:
                to: Side = "prefill" if node.cap > home else "decode"
                self.moved[node.descriptor.node] = Moved(node.cap, now, to)

    def _cap(self, node: NodeView) -> int:
        """As it is, or as it will be in a moment."""
        moved = self.moved.get(node.descriptor.node)
        return moved.cap if moved else node.cap

    def _scores(self, nodes: Sequence[NodeView]) -> Scores:
        prefill = [
            prefill_score(node, self._goals)
            for node in nodes
            if self._cap(node) > node.descriptor.layout.block_size
        ]
        decode = [
            decode_score(node, self._goals)
            for node in nodes
            if self._cap(node) < node.descriptor.token_budget
        ]
        return Scores(_mean(prefill), _mean(decode), len(prefill), len(decode))

    def _sign(self, scores: Scores) -> str:
        high = [side for side in SIDES if scores.of(side) > self._at.high]
        if not high:
            return NORMAL
        if len(high) == 1 and scores.of(_other(high[0])) < self._at.low:
            return f"{IMBALANCE} {high[0]}"
        return f"{OVERLOAD} {max(high, key=scores.of)}"

    def _change_regime(self, scores: Scores) -> list[Order]:
        """A sign must last for some ticks, on the way in and on the way out."""
        sign = self._sign(scores)
        self._num_ticks = {sign: self._num_ticks.get(sign, 0) + 1}
        regime = sign.partition(" ")[0]
        if self._num_ticks[sign] < self._at.num_ticks or regime == self.regime:
            return []
        before, self.regime = self.regime, regime
        return [RegimeChange(before, regime, f"{sign} for {self._at.num_ticks} reports: {scores}")]

    def _lasts(self, sign: str) -> bool:
        return self._num_ticks.get(sign, 0) >= self._at.num_ticks

    # --- lending -----------------------------------------------------------------------------------

    def _lend(self, nodes: Sequence[NodeView], scores: Scores, now: float) -> None:
        for side in SIDES:
            is_gone = scores.num(side) == 0
            if not (is_gone or self._lasts(f"{IMBALANCE} {side}")):
                continue
            lenders = [node for node in nodes if self._may_lend(node, side, now, is_gone)]
            lenders.sort(key=lambda node: (self._load(node, side), node.node_id))
            num = max(1, int(len(lenders) * self._at.lent_at_once))
            for node in lenders[:num]:
                self.moved[node.descriptor.node] = Moved(self._lent_cap(node), now, side)

    def _may_lend(self, node: NodeView, to: Side, now: float, is_gone: bool) -> bool:
        """It is at home on the other side, and has been for a while."""
        moved = self.moved.get(node.descriptor.node)
        is_home = moved is None or moved.to is None
        is_settled = moved is None or now - moved.since >= self._at.dwell_s
        return node.descriptor.role == _other(to) and is_home and (is_settled or is_gone)

    def _load(self, node: NodeView, to: Side) -> float:
        """What the node has to do at home: the idlest is lent first."""
        return decode_score(node, self._goals) if to == "prefill" else prefill_score(node, self._goals)

    def _take_back(self, nodes: Sequence[NodeView], scores: Scores, now: float) -> None:
        for node in nodes:
            ref = node.descriptor.node
            moved = self.moved.get(ref)
            if moved is None or moved.to is None or now - moved.since < self._at.dwell_s:
                continue
            is_well = scores.of(moved.to) < self._at.back
            is_missed = self._lasts(f"{IMBALANCE} {_other(moved.to)}")
            if (is_well or is_missed) and self._others_serve(nodes, ref, moved.to):
                self.moved[ref] = Moved(home_cap(node.descriptor), now, None)

    def _others_serve(self, nodes: Sequence[NodeView], ref: NodeRef, side: Side) -> bool:
        """Is anyone at home on that side? If not, the node stays lent however idle it is."""
        return any(node.descriptor.role in (side, "mixed") for node in nodes if node.descriptor.node != ref)

    def _lent_cap(self, node: NodeView) -> int:
        """Prompt tokens per step that leave the decoding sequences their rhythm."""
        block_size, budget = node.descriptor.layout.block_size, node.descriptor.token_budget
        chunk = node.speed.chunk_within(
            self._goals.itl_s * self._at.rhythm_share, node.num_sequences, node.num_context_tokens
        )
        return max(2 * block_size, min(chunk // block_size * block_size, budget - block_size))

    def _keep_rhythm(self, nodes: Sequence[NodeView]) -> None:
        """Lent nodes: as their sequences come and go, their caps follow."""
        for node in nodes:
            ref = node.descriptor.node
            moved = self.moved.get(ref)
            if moved is None or moved.to is None:
                continue
            cap = self._lent_cap(node)
            if max(cap, moved.cap) > self._at.recap_ratio * min(cap, moved.cap):
                self.moved[ref] = moved._replace(cap=cap)

    def _cap_orders(self, nodes: Sequence[NodeView]) -> list[Order]:
        """For each node whose report does not show its cap yet; asked again until it does."""
        orders: list[Order] = []
        for node in nodes:
            moved = self.moved.get(node.descriptor.node)
            if moved is not None and moved.cap != node.cap:
                reason = f"lent to {moved.to}" if moved.to else "taken back"
                orders.append(MoveCap(node.descriptor.node, moved.cap, f"{reason}, regime {self.regime}"))
        return orders

    # --- scaling -----------------------------------------------------------------------------------

    def _scale(self, scores: Scores, now: float) -> list[Order]:
        if max(scores.prefill, scores.decode) >= self._at.idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if now - self._scaled_at < self._at.scale_every_s:
            return []
        order = self._more(scores) or self._fewer(scores, now)
        if order is None:
            return []
        self._scaled_at = now
        return [order]

    def _more(self, scores: Scores) -> ScaleWanted | None:
        """As many nodes of the side as would bring its score down to half of the threshold."""
        for side in SIDES:
            num = scores.num(side)
            if self._lasts(f"{OVERLOAD} {side}") and num:
                change = math.ceil(num * scores.of(side) / self._at.high) - num
                return ScaleWanted(side, max(1, min(change, num)), str(scores))
        return None

    def _fewer(self, scores: Scores, now: float) -> ScaleWanted | None:
        if self._idle_since is None or now - self._idle_since < self._at.idle_s:
            return None
        side = max(SIDES, key=scores.num)
        if scores.num(side) < 2:
            return None
        return ScaleWanted(side, -1, f"idle for {self._at.idle_s:.0f} s: {scores}")


def _other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else math.inf
