"""A mean per second over the latest events, however fast they come. Pure: `now` is seconds of any clock."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import NodeDescriptor, starting_chunk_budget
from flowkv_scheduler.policy import Goals
from flowkv_scheduler.views import NodeView

# Counted as passed before the first event: one alone says nothing of a rate.
_HEAD_START_S = 2.0


class Rate:
    """What about the last `num_remembered` events brought, per second. It falls while none comes."""

    def __init__(self, num_remembered: int) -> None:
        self._keep = 1.0 - 1.0 / num_remembered
        self._amount = 0.0
        self._time_s = _HEAD_START_S
        self._at: float | None = None

    def add(self, amount: float, now: float) -> None:
        passed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._amount = self._keep * self._amount + amount
        self._time_s = self._keep * self._time_s + passed_s
        self._at = now

    def at(self, now: float) -> float:
        if self._at is None:
            return 0.0
        return self._amount / (self._time_s + max(0.0, now - self._at))


class MoveCap(NamedTuple):
    """Lend the node to the other side, or take it back: its prefill cap becomes `cap`."""

    node: NodeRef
    cap: int
    reason: str


class RegimeChange(NamedTuple):
    before: str
    after: str
    reason: str


class ScaleWanted(NamedTuple):
    """`change` more nodes of a role (fewer if negative) would meet the goals; 0 takes that back."""

    role: str
    change: int
    reason: str


Order = MoveCap | RegimeChange | ScaleWanted


Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")

# How busy a side may be for its goals: prompts queue long before a prefill node computes all the time, and
# a decode node at its limit takes nobody.
FULL_PREFILL = 0.8
FULL_DECODE = 0.9
# What a node that serves both sides is worth to each.
SHARED = 0.5


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Load(NamedTuple):
    """Of one side. Prefill is counted in prompt tokens per second, decode in nodes at their limit."""

    work: float
    capacity: float
    num_nodes: int

    @property
    def pressure(self) -> float:
        """0 is idle, 1 is as much as the goals allow; infinite where nobody stands."""
        return self.work / self.capacity if self.capacity > 0 else math.inf


class Scores(NamedTuple):
    """Both sides; and whether any node is fast enough for the inter-token goal, else all count as such."""

    prefill: Load
    decode: Load
    goals: Goals
    can_keep_rhythm: bool

    def of(self, side: Side) -> Load:
        return self.prefill if side == "prefill" else self.decode

    @property
    def worst(self) -> float:
        return max(self.prefill.pressure, self.decode.pressure)

    def capacity(self, node: NodeView, side: Side) -> float:
        """What the node adds to a side that has all of it."""
        if side == "prefill":
            return FULL_PREFILL / node.speed.prefill_token_s
        keeps_rhythm = node.speed.decode_step_s(1, 0) < self.goals.itl_s
        return FULL_DECODE if keeps_rhythm or not self.can_keep_rhythm else 0.0

    def shared_capacity(self, node: NodeView, side: Side) -> float:
        """What the node adds to a side, given that it may serve both."""
        return self.capacity(node, side) * (SHARED if node.may_prefill and node.may_decode else 1.0)

    def after(self, node: NodeView, to: Side) -> Scores:
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

    def eased_by(self, node: NodeView, to: Side, gain: float) -> bool:
        """Would moving it bring the worse pressure down to at most that part of itself?"""
        return self.after(node, to).worst < self.worst * gain

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill.pressure:.2f} on {self.prefill.num_nodes}, "
            f"decode {self.decode.pressure:.2f} on {self.decode.num_nodes}"
        )


def scores_of(
    nodes: Sequence[NodeView], goals: Goals, prefill_rate: float, output_rate: float = 0.0
) -> Scores:
    """Tokens per second, lately: `prefill_rate` of prompts, `output_rate` of what these should bring.

    Prompts that wait are no sign of a want of prefill nodes: they may wait for room to decode. Those that
    have their pair count at their decode node already, as sequences that we gave it.
    """
    can_keep_rhythm = any(node.speed.decode_step_s(1, 0) < goals.itl_s for node in nodes)
    empty = Scores(Load(0.0, 0.0, 0), Load(0.0, 0.0, 0), goals, can_keep_rhythm)
    prefill = [empty.shared_capacity(node, "prefill") for node in nodes if node.may_prefill]
    decode = [empty.shared_capacity(node, "decode") for node in nodes if node.may_decode]
    decoding = max(sum(decode_score(node, goals) for node in nodes), _nodes_for(nodes, goals, output_rate))
    return empty._replace(
        prefill=Load(prefill_rate, sum(prefill), len(prefill)),
        decode=Load(decoding, sum(decode), len(decode)),
    )


def _nodes_for(nodes: Sequence[NodeView], goals: Goals, output_rate: float) -> float:
    """How many nodes at their limit produce so many tokens per second.

    What decodes now tells late what prompts will bring; as many as come are decoding in the end.
    """
    num_sequences = sum(node.num_sequences for node in nodes)
    context = sum(node.num_context_tokens for node in nodes) / max(1, num_sequences)
    rates = [_tokens_per_s(node, goals, context) for node in nodes if node.may_decode]
    return output_rate * len(rates) / sum(rates) if rates else 0.0


def _tokens_per_s(node: NodeView, goals: Goals, context: float) -> float:
    """With as many sequences of so many tokens each as the goal, the places and the pool allow."""
    each_s = node.speed.sequence_s + context * node.speed.context_token_s
    limits = [float(node.report.max_num_seqs), node.num_tokens_held / max(1.0, context)]
    if each_s > 0.0:
        limits.append((goals.itl_s - node.speed.base_s) / each_s)
    num = max(1.0, min(limits))
    return num / (node.speed.base_s + num * each_s)


def decode_score(node: NodeView, goals: Goals) -> float:
    """How far the node is from idle to its limit, in rhythm, room or places, whichever is nearest."""
    if node.num_sequences == 0:
        return 0.0
    one_s = node.speed.decode_step_s(1, 0)
    now_s = node.speed.decode_step_s(node.num_sequences, node.num_context_tokens)
    rhythm = (now_s - one_s) / (goals.itl_s - one_s) if goals.itl_s > one_s else 0.0
    blocks = node.report.blocks
    room = (blocks.leased + blocks.quarantined + node.given.num_blocks) / max(1, blocks.total)
    places = node.num_sequences / max(1, node.report.max_num_seqs)
    return max(rhythm, room, places)


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
    """The cap that the node was started with."""
    return starting_chunk_budget(descriptor.role, descriptor.token_budget, descriptor.layout.block_size)


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
