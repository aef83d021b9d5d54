"""Lends idle nodes to the other side by moving their prefill caps, and takes them back. It can't flap.

A node changes sides without a pause: it gets nothing new on the side that it leaves, works off what it has
there in rhythm, and is all the other side's when that is done. The last node of a side serves both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.orders import MoveCap, Order
from flowkv_scheduler.scores import SIDES, Scores, Side, decode_score, other
from flowkv_scheduler.view import NodeView
from flowkv_scheduler.weighing import Goals


class Thresholds(msgspec.Struct, frozen=True):
    """Pressures are 0 when idle and 1 at the limit. Ticks are calls of `Regimes.tick`."""

    calm: float = 0.5  # below this nobody is moved but back
    gain: float = 0.9  # a move must bring the worse pressure down to this part of itself
    num_ticks: int = 2
    dwell_s: float = 3.0  # what was moved stays so long
    # While a node works off what is left, its steps take this part of the inter-token goal.
    rhythm_share: float = 0.65
    recap_ratio: float = 1.25  # a cap is adjusted when it is off by so much
    lent_at_once: float = 0.25  # of the lending side, at least one node


class Moved(NamedTuple):
    """A node that we have moved `to` a side; `is_shared` if it serves both."""

    to: Side
    since: float
    is_shared: bool
    cap: int


def home_cap(descriptor: NodeDescriptor) -> int:
    """The cap that the node was started with: see `flowkv_common.node.host.prefill_cap`."""
    block_size, budget = descriptor.layout.block_size, descriptor.token_budget
    return {"prefill": budget, "decode": block_size}.get(descriptor.role, max(block_size, budget // 2))


def _whole_caps(descriptor: NodeDescriptor) -> tuple[int, int]:
    """Of a node that is all prefill, or all decode."""
    return descriptor.token_budget, descriptor.layout.block_size


class Lending:
    """Remembers what it has moved, and when. `see`, `move`, `orders`: once per tick, in this order."""

    def __init__(self, goals: Goals, thresholds: Thresholds) -> None:
        self._goals = goals
        self._at = thresholds
        self._moved: dict[NodeRef, Moved] = {}
        self._roles: dict[NodeRef, str] = {}

    @property
    def leaving(self) -> Mapping[str, Side]:
        return {ref.node_id: other(m.to) for ref, m in self._moved.items() if not m.is_shared}

    @property
    def lent(self) -> Mapping[NodeRef, Side]:
        return {ref: moved.to for ref, moved in self._moved.items() if self._roles[ref] != moved.to}

    def follow(self, registry: Iterable[NodeDescriptor]) -> None:
        """Forget lives that ended. A node that is only silent is still where it was moved to."""
        self._roles = {descriptor.node: descriptor.role for descriptor in registry}
        self._moved = {ref: moved for ref, moved in self._moved.items() if ref in self._roles}

    def see(self, nodes: Sequence[NodeView], now: float) -> None:
        """Take over what a leader before us has lent; let caps follow the work."""
        self._roles |= {node.descriptor.node: node.descriptor.role for node in nodes}
        # Those that have moved with all they have first: of the others the last one of a side serves both.
        for node in sorted(nodes, key=lambda node: node.cap not in _whole_caps(node.descriptor)):
            ref, home = node.descriptor.node, home_cap(node.descriptor)
            moved = self._moved.get(ref)
            if moved is None and node.cap != home and node.descriptor.role in SIDES:
                self._moved[ref] = self._adopted(node, now)
            elif moved is not None:
                self._moved[ref] = self._adjusted(node, moved)
                is_settled = now - moved.since >= self._at.dwell_s
                if moved.to == node.descriptor.role and node.cap == home and is_settled:
                    del self._moved[ref]

    def move(
        self,
        nodes: Sequence[NodeView],
        scores: Scores,
        needy: Side | None,
        empty: Collection[Side],
        now: float,
    ) -> bool:
        """Lend to the needy side, and to those that are empty; take back what is not needed."""
        moved_any = False
        for side in SIDES:
            if side in empty or side == needy:
                moved_any |= self._lend(nodes, scores, side, now, side in empty)
        return moved_any or self._take_back(nodes, scores, now)

    def orders(self, nodes: Sequence[NodeView], regime: str) -> list[Order]:
        """For each node whose report does not show its cap yet; asked again until it does."""
        orders: list[Order] = []
        for node in nodes:
            moved = self._moved.get(node.descriptor.node)
            if moved is None or moved.cap == node.cap:
                continue
            is_home = moved.to == node.descriptor.role
            reason = f"{'taken back' if is_home else 'lent'} to {moved.to}, regime {regime}"
            orders.append(MoveCap(node.descriptor.node, moved.cap, reason))
        return orders

    # --- lending and taking back -------------------------------------------------------------------

    def _lend(self, nodes: Sequence[NodeView], scores: Scores, to: Side, now: float, is_empty: bool) -> bool:
        """Those of the other side that help the most, a share of them at once; as long as it helps."""
        lenders = [node for node in nodes if self._may_move(node, to, now, is_empty)]
        num_at_home = sum(self._serves(node.descriptor.node, other(to)) for node in nodes)
        num_before = num_at_home
        for _ in range(max(1, int(len(lenders) * self._at.lent_at_once))):
            best = self._best_lender(lenders, scores, to)
            if best is None or not (is_empty or scores.eased_by(best, to, self._at.gain)):
                break
            scores = scores.after(best, to)
            lenders.remove(best)
            moved = self._moved.get(best.descriptor.node)
            if moved is not None and now - moved.since < self._at.dwell_s:
                # Nobody stands there: it helps out, and what it was moved for goes on.
                shared = moved._replace(is_shared=True)
                self._moved[best.descriptor.node] = shared._replace(cap=self._cap_for(best, shared))
            else:
                self._put(best, to, now, is_shared=num_at_home <= 1)
            num_at_home -= 1
        return num_at_home < num_before

    def _best_lender(self, lenders: Sequence[NodeView], scores: Scores, to: Side) -> NodeView | None:
        """Of those that help as much the idlest."""
        return min(
            lenders,
            key=lambda node: (scores.after(node, to).worst, self._load(node, other(to)), node.node_id),
            default=None,
        )

    def _take_back(self, nodes: Sequence[NodeView], scores: Scores, now: float) -> bool:
        for node in nodes:
            moved = self._moved.get(node.descriptor.node)
            role = node.descriptor.role
            if moved is None or role not in SIDES or now - moved.since < self._at.dwell_s:
                continue
            if moved.to == role and not moved.is_shared:
                continue
            helped = other(role)
            is_well = scores.after(node, other(helped)).worst < self._at.calm
            others = [one for one in nodes if one is not node and self._serves(one.descriptor.node, helped)]
            if is_well and others:
                self._put(node, other(helped), now, is_shared=False)
                return True  # one at a time, to see what that does
        return False

    def _may_move(self, node: NodeView, to: Side, now: float, is_empty: bool) -> bool:
        """It serves the other side only, and has done so for a while."""
        moved = self._moved.get(node.descriptor.node)
        if moved is None:
            return node.descriptor.role == other(to)
        is_settled = now - moved.since >= self._at.dwell_s
        return (moved.to == other(to) or moved.is_shared) and moved.to != to and (is_settled or is_empty)

    def _serves(self, ref: NodeRef, side: Side) -> bool:
        moved = self._moved.get(ref)
        if moved is None:
            return self._roles[ref] in (side, "mixed")
        return moved.is_shared or moved.to == side

    def _load(self, node: NodeView, side: Side) -> float:
        return decode_score(node, self._goals) if side == "decode" else node.prefill_wait_s

    # --- caps --------------------------------------------------------------------------------------

    def _put(self, node: NodeView, to: Side, now: float, *, is_shared: bool) -> None:
        moved = Moved(to, now, is_shared, node.cap)
        self._moved[node.descriptor.node] = moved._replace(cap=self._cap_for(node, moved))

    def _cap_for(self, node: NodeView, moved: Moved) -> int:
        """All or nothing once the other work is done, until then as much as keeps the rhythm."""
        block_size, budget = node.descriptor.layout.block_size, node.descriptor.token_budget
        if not moved.is_shared and moved.to == "prefill" and not node.num_context_tokens:
            return budget
        if not moved.is_shared and moved.to == "decode" and not node.num_queued_tokens:
            return block_size
        step_s = self._goals.itl_s * self._at.rhythm_share
        # Those that decode there now. Who is to come from prompts that wait here must not hold these up.
        num_sequences = node.report.num_running + node.report.num_waiting
        chunk = node.speed.chunk_within(step_s, num_sequences, node.report.num_context_tokens)
        # Over a block, since a cap of one block is a decode node's; no more if even this is too much.
        return max(block_size + 1, min(chunk, budget - 1))

    def _adopted(self, node: NodeView, now: float) -> Moved:
        mine = node.descriptor.node
        to: Side = "prefill" if node.cap > home_cap(node.descriptor) else "decode"
        stay = [ref for ref in self._roles if ref != mine and self._serves(ref, other(to))]
        return Moved(to, now, is_shared=not stay, cap=node.cap)

    def _adjusted(self, node: NodeView, moved: Moved) -> Moved:
        whole = _whole_caps(node.descriptor)
        if moved.cap in whole and not moved.is_shared:
            return moved  # it has arrived
        cap = self._cap_for(node, moved)
        is_whole = cap in whole and not moved.is_shared
        is_off = max(cap, moved.cap) > self._at.recap_ratio * min(cap, moved.cap)
        return moved._replace(cap=cap) if is_whole or is_off else moved
