"""Rebalancing: finds the cluster's regime, lends nodes to the side that is short, asks for more or fewer.

A node is lent by its prefill chunk budget. Called once per period with all usable nodes; the same calls give
the same orders. Pure: `now` is seconds of any clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import (
    NodeDescriptor,
    RegimeChanged,
    ScaleWanted,
    SetPrefillCap,
    starting_chunk_budget,
)
from flowkv_scheduler.cluster import Goals, NodeView

# How busy a side may be for its targets: prompts queue long before a prefill node computes all the time, and
# a decode node at its limit takes no request.
FULL_PREFILL = 0.8
FULL_DECODE = 0.9
# What a node that serves both sides is worth to each.
SHARED = 0.5
# While a node serves both sides, or works off what is left, its steps take this part of the ITL target.
SHARED_ITL = 0.65
# Below this pressure nodes are only taken back. Pressures are 0 when idle and 1 at the limit.
CALM_PRESSURE = 0.5
# A move must bring the worse pressure down to this part of itself.
GAIN = 0.9
# A sign must last for so many ticks, on the way in and on the way out.
NUM_TICKS = 2
# A node that was moved stays for so long: it takes seconds to see what a move does.
DWELL_S = 3.0
# A budget is adjusted when it is off by this factor.
ADJUST_RATIO = 1.25
# Of the lending side, at least one node.
LENT_AT_ONCE = 0.25
# A cluster whose worse pressure is below the first for so long could do with fewer nodes.
IDLE_PRESSURE = 0.05
IDLE_S = 60.0
# Between two requests for more or fewer nodes.
SCALE_EVERY_S = 10.0
# Time counted as passed before the first event of a rate: one alone says nothing.
RATE_HEAD_START_S = 2.0

NORMAL, IMBALANCE, OVERLOAD = REGIMES = "normal", "imbalance", "overload"

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")

# Orders are wire messages with epoch 0: the leader puts in its own.
Order = SetPrefillCap | RegimeChanged | ScaleWanted
NO_EPOCH = 0


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Rate:
    """What about the last `num_remembered` events brought, per second. It falls while none comes."""

    def __init__(self, num_remembered: int) -> None:
        self._keep = 1.0 - 1.0 / num_remembered
        self._amount = 0.0
        self._time_s = RATE_HEAD_START_S
        self._at: float | None = None

    def add_event(self, amount: float, now: float) -> None:
        passed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._amount = self._keep * self._amount + amount
        self._time_s = self._keep * self._time_s + passed_s
        self._at = now

    def per_second(self, now: float) -> float:
        if self._at is None:
            return 0.0
        return self._amount / (self._time_s + max(0.0, now - self._at))


class Load(NamedTuple):
    """Of one side. Prefill is counted in prompt tokens per second, decode in nodes at their limit."""

    work: float
    capacity: float
    num_nodes: int

    @property
    def pressure(self) -> float:
        """0 is idle, 1 is as much as the targets allow; infinite without nodes."""
        return self.work / self.capacity if self.capacity > 0 else math.inf


class Pressures(NamedTuple):
    """Both sides. `can_meet_itl`: some node is fast enough for the ITL target, else all count as such."""

    prefill: Load
    decode: Load
    goals: Goals
    can_meet_itl: bool

    def of(self, side: Side) -> Load:
        return self.prefill if side == "prefill" else self.decode

    @property
    def worst(self) -> float:
        return max(self.prefill.pressure, self.decode.pressure)

    def capacity(self, node: NodeView, side: Side) -> float:
        """What the node adds to a side that has all of it."""
        if side == "prefill":
            return FULL_PREFILL / node.speed.prefill_token_s
        meets_itl = node.speed.decode_step_s(1, 0) < self.goals.itl_s
        return FULL_DECODE if meets_itl or not self.can_meet_itl else 0.0

    def after(self, node: NodeView, to: Side) -> Pressures:
        """With the node moved. The last one of a side goes on serving it."""
        away = other(to)
        gains, loses = self.of(to), self.of(away)
        is_last = loses.num_nodes == 1
        share = SHARED if is_last else 1.0
        gains = Load(gains.work, gains.capacity + share * self.capacity(node, to), gains.num_nodes + 1)
        capacity = loses.capacity - share * self.capacity(node, away)
        loses = Load(loses.work, capacity, loses.num_nodes - (not is_last))
        prefill, decode = (gains, loses) if to == "prefill" else (loses, gains)
        return self._replace(prefill=prefill, decode=decode)

    def eased_by(self, node: NodeView, to: Side) -> bool:
        return self.after(node, to).worst < self.worst * GAIN

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill.pressure:.2f} on {self.prefill.num_nodes}, "
            f"decode {self.decode.pressure:.2f} on {self.decode.num_nodes}"
        )


def pressures_of(
    nodes: Sequence[NodeView], goals: Goals, prefill_rate: float, output_rate: float = 0.0
) -> Pressures:
    """Recent tokens per second: `prefill_rate` of prompts, `output_rate` of what these should bring.

    Prompts that wait are no sign of a want of prefill nodes: they may wait for room to decode. Those that
    have their pair count at their decode node already, as sequences that we gave it.
    """
    can_meet_itl = any(node.speed.decode_step_s(1, 0) < goals.itl_s for node in nodes)
    empty = Pressures(Load(0.0, 0.0, 0), Load(0.0, 0.0, 0), goals, can_meet_itl)

    def load(side: Side, work: float) -> Load:
        serving = [node for node in nodes if (node.may_prefill if side == "prefill" else node.may_decode)]
        capacities = (
            empty.capacity(node, side) * (SHARED if node.may_prefill and node.may_decode else 1.0)
            for node in serving
        )
        return Load(work, sum(capacities), len(serving))

    # Sequences that decode now tell late what prompts will bring; as many as come are decoding in the end.
    num_sequences = sum(node.num_sequences for node in nodes)
    context = sum(node.num_context_tokens for node in nodes) / max(1, num_sequences)
    rates = [_tokens_per_s(node, goals, context) for node in nodes if node.may_decode]
    coming = output_rate * len(rates) / sum(rates) if rates else 0.0
    decoding = max(sum(decode_pressure(node, goals) for node in nodes), coming)
    return empty._replace(prefill=load("prefill", prefill_rate), decode=load("decode", decoding))


def _tokens_per_s(node: NodeView, goals: Goals, context: float) -> float:
    """With as many sequences of `context` tokens each as the ITL target, the places and the pool allow."""
    each_s = node.speed.sequence_s + context * node.speed.context_token_s
    limits = [float(node.report.max_num_seqs), node.num_tokens_held / max(1.0, context)]
    if each_s > 0.0:
        limits.append((goals.itl_s - node.speed.base_s) / each_s)
    num = max(1.0, min(limits))
    return num / (node.speed.base_s + num * each_s)


def decode_pressure(node: NodeView, goals: Goals) -> float:
    """How far the node is from idle to its limit, in ITL, blocks or places, whichever is nearest."""
    if node.num_sequences == 0:
        return 0.0
    one_s = node.speed.decode_step_s(1, 0)
    now_s = node.speed.decode_step_s(node.num_sequences, node.num_context_tokens)
    itl = (now_s - one_s) / (goals.itl_s - one_s) if goals.itl_s > one_s else 0.0
    blocks = node.report.blocks
    room = (blocks.leased + blocks.quarantined + node.given.num_blocks) / max(1, blocks.total)
    places = node.num_sequences / max(1, node.report.max_num_seqs)
    return max(itl, room, places)


class Sign(NamedTuple):
    """What one look at the pressures says: a regime, and the side that is short of nodes."""

    regime: str
    needy: Side | None = None


def sign_of(nodes: Sequence[NodeView], pressures: Pressures) -> Sign:
    """Imbalance is a need that the other side can ease without getting into such need itself."""
    if pressures.worst <= CALM_PRESSURE:
        return Sign(NORMAL)
    side = max(SIDES, key=lambda side: pressures.of(side).pressure)
    lenders = [node for node in nodes if not (node.may_prefill if side == "prefill" else node.may_decode)]
    if any(pressures.eased_by(node, side) for node in lenders):
        return Sign(IMBALANCE, side)
    return Sign(OVERLOAD, side) if pressures.worst > 1.0 else Sign(NORMAL)


class Moved(NamedTuple):
    """A node that we have moved `to` a side; `is_shared` if it serves both."""

    to: Side
    since: float
    is_shared: bool
    chunk_budget: int


def _whole_budgets(descriptor: NodeDescriptor) -> tuple[int, int]:
    """Of a node that is all prefill, or all decode."""
    return descriptor.token_budget, descriptor.layout.block_size


class Rebalancer:
    """Remembers the regime, and which nodes it has moved and when."""

    def __init__(self, goals: Goals, *, lends: bool = True) -> None:
        self.regime = NORMAL
        self.moved: dict[NodeRef, Moved] = {}
        self._roles: dict[NodeRef, str] = {}
        self._goals = goals
        self._lends = lends
        self._sign = Sign(NORMAL)
        self._num_ticks = 0  # that the sign has lasted
        self._empty_ticks = dict.fromkeys(SIDES, 0)  # that the side has had no nodes
        self._idle_since: float | None = None
        self._scaled_at = -math.inf
        self._wanted: ScaleWanted | None = None  # as last told, while it stands

    @property
    def leaving(self) -> Mapping[str, Side]:
        """Nodes that shall get nothing new on a side, though their budget would still allow it."""
        return {ref.node_id: other(moved.to) for ref, moved in self.moved.items() if not moved.is_shared}

    def set_descriptors(self, registry: Iterable[NodeDescriptor]) -> None:
        """Forget lives that ended. A node that is only silent is still where it was moved to."""
        self._roles = {descriptor.node: descriptor.role for descriptor in registry}
        self.moved = {ref: moved for ref, moved in self.moved.items() if ref in self._roles}

    def tick(
        self, nodes: Sequence[NodeView], prefill_rate: float, now: float, output_rate: float = 0.0
    ) -> list[Order]:
        """What should change now. Rates are those of `pressures_of`."""
        if not nodes:
            return []
        nodes = sorted(nodes, key=lambda node: node.node_id)
        if self._lends:
            self._see(nodes, now)
        pressures = pressures_of(nodes, self._goals, prefill_rate, output_rate)
        orders = self._change_regime(nodes, pressures)
        if self._lends:
            if self._move(nodes, pressures, now):
                self._num_ticks = 0  # see what that does before the next move
            orders += self._budget_orders(nodes)
        return orders + self._scale(pressures, now)

    def _change_regime(self, nodes: Sequence[NodeView], pressures: Pressures) -> list[Order]:
        sign = sign_of(nodes, pressures)
        self._num_ticks = self._num_ticks + 1 if sign == self._sign else 1
        self._sign = sign
        if self._num_ticks < NUM_TICKS or sign.regime == self.regime:
            return []
        before, self.regime = self.regime, sign.regime
        short = f", {sign.needy} is short of nodes" if sign.needy else ""
        reason = f"for {NUM_TICKS} reports: {pressures}{short}"
        return [RegimeChanged(epoch=NO_EPOCH, before=before, after=sign.regime, reason=reason)]

    # --- lending -----------------------------------------------------------------------------------

    def _see(self, nodes: Sequence[NodeView], now: float) -> None:
        """Adopt what a leader before us has lent; let budgets follow the work."""
        self._roles |= {node.descriptor.node: node.descriptor.role for node in nodes}
        # Nodes that have moved with all they have come first: of the others the last of a side serves both.
        for node in sorted(nodes, key=lambda node: node.chunk_budget not in _whole_budgets(node.descriptor)):
            ref, role = node.descriptor.node, node.descriptor.role
            whole = _whole_budgets(node.descriptor)
            home = starting_chunk_budget(
                role, node.descriptor.token_budget, node.descriptor.layout.block_size
            )
            moved = self.moved.get(ref)
            if moved is None:
                if node.chunk_budget != home and role in SIDES:
                    to: Side = "prefill" if node.chunk_budget > home else "decode"
                    is_last = not any(one != ref and self._serves(one, other(to)) for one in self._roles)
                    self.moved[ref] = Moved(to, now, is_last, node.chunk_budget)
                continue
            if moved.chunk_budget not in whole or moved.is_shared:  # else it has arrived
                budget = self._budget_for(node, moved.to, moved.is_shared)
                is_whole = budget in whole and not moved.is_shared
                low, high = sorted((budget, moved.chunk_budget))
                if is_whole or high > ADJUST_RATIO * low:
                    self.moved[ref] = moved._replace(chunk_budget=budget)
            if moved.to == role and node.chunk_budget == home and now - moved.since >= DWELL_S:
                del self.moved[ref]

    def _move(self, nodes: Sequence[NodeView], pressures: Pressures, now: float) -> bool:
        """Lend to the side that is short, and to those that are empty; take back what is not needed.

        A side is empty without nodes for some ticks: while nodes start, one side is often first.
        """
        is_imbalance = self._sign.regime == IMBALANCE and self._num_ticks >= NUM_TICKS
        moved_any = False
        for side in SIDES:
            self._empty_ticks[side] = 0 if pressures.of(side).num_nodes else self._empty_ticks[side] + 1
            is_empty = self._empty_ticks[side] >= NUM_TICKS
            if is_empty or (is_imbalance and side == self._sign.needy):
                moved_any |= self._lend(nodes, pressures, side, now, is_empty=is_empty)
        return moved_any or self._take_back(nodes, pressures, now)

    def _lend(
        self, nodes: Sequence[NodeView], pressures: Pressures, to: Side, now: float, *, is_empty: bool
    ) -> bool:
        """The nodes of the other side that help the most, a share of them at once; as long as it helps."""
        home = other(to)
        lenders = [node for node in nodes if self._may_move(node, to, now, is_empty=is_empty)]
        num_at_home = num_before = sum(self._serves(node.descriptor.node, home) for node in nodes)
        for _ in range(max(1, int(len(lenders) * LENT_AT_ONCE))):
            # Of those that help as much the idlest.
            best = min(
                lenders,
                key=lambda node: (
                    pressures.after(node, to).worst,
                    decode_pressure(node, self._goals) if home == "decode" else node.prefill_wait_s,
                    node.node_id,
                ),
                default=None,
            )
            if best is None or not (is_empty or pressures.eased_by(best, to)):
                break
            pressures = pressures.after(best, to)
            lenders.remove(best)
            moved = self.moved.get(best.descriptor.node)
            if moved is not None and now - moved.since < DWELL_S:
                # No other node is there: it helps out, and what it was moved for goes on.
                self._put(best, moved.to, moved.since, is_shared=True)
            else:
                self._put(best, to, now, is_shared=num_at_home <= 1)
            num_at_home -= 1
        return num_at_home < num_before

    def _take_back(self, nodes: Sequence[NodeView], pressures: Pressures, now: float) -> bool:
        for node in nodes:
            ref, role = node.descriptor.node, node.descriptor.role
            moved = self.moved.get(ref)
            if moved is None or role not in SIDES or now - moved.since < DWELL_S:
                continue
            if moved.to == role and not moved.is_shared:
                continue
            helped = other(role)
            home = other(helped)
            is_calm = pressures.after(node, home).worst < CALM_PRESSURE
            if is_calm and any(
                one is not node and self._serves(one.descriptor.node, helped) for one in nodes
            ):
                self._put(node, home, now, is_shared=False)
                return True  # one at a time, to see what that does
        return False

    def _may_move(self, node: NodeView, to: Side, now: float, *, is_empty: bool) -> bool:
        """It serves the other side only, and has done so for a while."""
        moved = self.moved.get(node.descriptor.node)
        if moved is None:
            return node.descriptor.role == other(to)
        is_settled = now - moved.since >= DWELL_S
        return moved.to != to and (is_settled or is_empty)

    def _serves(self, ref: NodeRef, side: Side) -> bool:
        moved = self.moved.get(ref)
        if moved is None:
            return self._roles[ref] in (side, "mixed")
        return moved.is_shared or moved.to == side

    def _put(self, node: NodeView, to: Side, since: float, *, is_shared: bool) -> None:
        self.moved[node.descriptor.node] = Moved(to, since, is_shared, self._budget_for(node, to, is_shared))

    def _budget_for(self, node: NodeView, to: Side, is_shared: bool) -> int:
        """All or nothing once the other work is done, until then as much as the ITL target allows."""
        token_budget, block_size = _whole_budgets(node.descriptor)
        if not is_shared and to == "prefill" and not node.num_context_tokens:
            return token_budget
        if not is_shared and to == "decode" and not node.num_queued_tokens:
            return block_size
        # Sequences that decode there now. Those to come from prompts that wait here must not delay these.
        num_sequences = node.report.num_running + node.report.num_waiting
        decode_s = node.speed.decode_step_s(num_sequences, node.report.num_context_tokens)
        chunk = max(0, int((self._goals.itl_s * SHARED_ITL - decode_s) / node.speed.prefill_token_s))
        # Over a block, since a budget of one block is a decode node's; no more if even this is too much.
        return max(block_size + 1, min(chunk, token_budget - 1))

    def _budget_orders(self, nodes: Sequence[NodeView]) -> list[Order]:
        """For each node whose report does not show its budget yet; repeated until it does."""
        orders: list[Order] = []
        for node in nodes:
            moved = self.moved.get(node.descriptor.node)
            if moved is None or moved.chunk_budget == node.chunk_budget:
                continue
            what = "taken back" if moved.to == node.descriptor.role else "lent"
            orders.append(
                SetPrefillCap(
                    node=node.descriptor.node,
                    epoch=NO_EPOCH,
                    max_prefill_tokens_per_step=moved.chunk_budget,
                    reason=f"{what} to {moved.to}, regime {self.regime}",
                )
            )
        return orders

    # --- scaling -----------------------------------------------------------------------------------

    def _scale(self, pressures: Pressures, now: float) -> list[Order]:
        if pressures.worst >= IDLE_PRESSURE:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        is_due = now - self._scaled_at >= SCALE_EVERY_S
        more, fewer = self._more(pressures), self._fewer(pressures, now)
        order = more or fewer if is_due else None
        orders: list[Order] = []
        if before := self._wanted:
            # Overload ends late enough by itself: see `_change_regime`.
            has_ended = self.regime != OVERLOAD if before.change > 0 else fewer is None
            if order.role != before.role if order else has_ended:
                orders.append(_wanted(before.role, 0, str(pressures)))
                self._wanted = None
        if order:
            orders.append(order)
            self._wanted, self._scaled_at = order, now
        return orders

    def _more(self, pressures: Pressures) -> ScaleWanted | None:
        """As many nodes of the side that is short as would do all of its work, at most twice as many."""
        side = self._sign.needy
        if self.regime != OVERLOAD or side is None or not pressures.of(side).num_nodes:
            return None
        num = pressures.of(side).num_nodes
        change = math.ceil(num * pressures.of(side).pressure) - num
        return _wanted(side, max(1, min(change, num)), str(pressures))

    def _fewer(self, pressures: Pressures, now: float) -> ScaleWanted | None:
        if self._idle_since is None or now - self._idle_since < IDLE_S:
            return None
        side = max(SIDES, key=lambda side: pressures.of(side).num_nodes)
        if pressures.of(side).num_nodes < 2:
            return None
        return _wanted(side, -1, f"idle for {IDLE_S:.0f} s: {pressures}")


def _wanted(role: str, change: int, reason: str) -> ScaleWanted:
    return ScaleWanted(epoch=NO_EPOCH, role=role, change=change, reason=reason)
