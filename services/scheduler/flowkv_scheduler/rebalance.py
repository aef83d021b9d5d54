"""Rebalancing: which nodes prefill, which decode, which do both; and whether nodes are wanted.

A node is moved where a look ahead (`lookahead.py`) says that more requests would be served in time, for more
than a chance. It stays where it is until that is said of another side: going home is a move like any other.
What moves is the node's prefill chunk budget. Called once per period with all usable nodes; the same calls
give the same orders. Pure: `now` is seconds of any clock.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import (
    NodeDescriptor,
    RegimeChanged,
    ScaleWanted,
    SetPrefillCap,
    starting_chunk_budget,
)
from flowkv_scheduler.cluster import Goals, NodeView, speed_class
from flowkv_scheduler.demand import REMEMBERED_S, Demand, OutputLengths, Window
from flowkv_scheduler.lookahead import Duties, Duty, LookAhead, Side

# While a node serves both sides, or works off what is left, its steps take this part of the ITL target.
SHARED_ITL = 0.65
# Played are the requests of the last so many seconds, the shortest time first: there a change shows first.
# A move forgets what came before its window, for that was another traffic.
WINDOWS_S = (10.0, 40.0, 160.0)
# Fewer requests say nothing; more cost time: 400 are played in about a millisecond.
MIN_REQUESTS = 10
MAX_REQUESTS = 400
# From so many nodes on only some of the requests are played, on as few of the nodes.
NODES_PER_PLAY = 16
# A move must serve this share more of the requests in time, and so many times the standard error of that.
MIN_GAIN = 0.03
NUM_ERRORS = 2.0
# And one more for each time that a move went against the one before, up to so many.
MOST_TURNS = 3
# A sign must last for so many ticks.
NUM_TICKS = 2
# A moved node's budget follows its work when it is off by this factor.
ADJUST_RATIO = 1.25
# A node that is at home again is followed for so long.
SETTLED_S = 3.0
# A cluster that would do with one node fewer for so long is told so.
IDLE_S = 60.0
# Between two requests for more or fewer nodes.
SCALE_EVERY_S = 10.0

NORMAL, IMBALANCE, OVERLOAD = REGIMES = "normal", "imbalance", "overload"
SIDES: tuple[Side, Side] = ("prefill", "decode")

# Orders are wire messages with epoch 0: the leader puts in its own.
Order = SetPrefillCap | RegimeChanged | ScaleWanted
NO_EPOCH = 0


def other(side: str) -> Side:
    return "decode" if side == "prefill" else "prefill"


class Moved(NamedTuple):
    """A node that was given a duty: which, why, since when, and its prefill chunk budget now."""

    duty: Duty
    since: float
    reason: str
    chunk_budget: int


class Move(NamedTuple):
    node: NodeView
    duty: Duty
    reason: str


class Rebalancer:
    """Remembers the regime, and which nodes it has moved and when."""

    def __init__(self, goals: Goals, *, lends: bool = True) -> None:
        self.regime = NORMAL
        self.moved: dict[NodeRef, Moved] = {}
        self._roles: dict[NodeRef, str] = {}
        self._goals = goals
        self._lends = lends
        self._since: dict[str, float] = {}  # by model, what came before is forgotten
        self._proposed: dict[str, tuple[Duty, Duty] | None] = {}
        self._last_moves: dict[str, tuple[Duty, float]] = {}
        self._num_turns: dict[str, int] = {}  # how often a move went against the one before
        self._empty_ticks: defaultdict[tuple[str, Side], int] = defaultdict(int)
        self._sign = NORMAL
        self._num_ticks = 0  # that the sign has lasted
        self._idle_since: dict[str, float] = {}
        self._scaled_at = -math.inf
        self._wanted: ScaleWanted | None = None  # as last told, while it stands

    @property
    def leaving(self) -> Mapping[str, Side]:
        """Nodes that shall get nothing new on a side, though their budget would still allow it."""
        return {ref.node_id: other(moved.duty) for ref, moved in self.moved.items() if moved.duty != "both"}

    def set_descriptors(self, registry: Iterable[NodeDescriptor]) -> None:
        """Forget lives that ended. A node that is only silent is still where it was moved to."""
        self._roles = {descriptor.node: descriptor.role for descriptor in registry}
        self.moved = {ref: moved for ref, moved in self.moved.items() if ref in self._roles}

    def tick(
        self,
        nodes: Sequence[NodeView],
        demands: Mapping[str, Demand],
        lengths: Mapping[str, OutputLengths],
        now: float,
    ) -> list[Order]:
        """What should change now. Demands and lengths are by the fingerprint of the model."""
        nodes = sorted(nodes, key=lambda node: node.node_id)
        self._roles |= {node.descriptor.node: node.descriptor.role for node in nodes}
        by_model: dict[str, list[NodeView]] = defaultdict(list)
        for node in nodes:
            by_model[node.descriptor.model.fingerprint].append(node)
        orders: list[Order] = []
        signs, scaling = [NORMAL], list[ScaleWanted]()
        for model, members in by_model.items():
            demand = demands.get(model)
            if self._lends:
                self._adopt(members, now)
                self._fill_empty_side(model, members, now)
                if demand is not None:
                    self._move_nodes(model, members, demand, lengths[model], now)
            sign = self._sign_of(members, demand, now)
            signs.append(sign)
            if demand is not None and sign == OVERLOAD:
                scaling += self._more_nodes(members, demand, lengths[model], now)
            elif self._could_do_with_fewer(model, members, demand, lengths[model], now):
                scaling += self._fewer_nodes(members)
        orders += self._change_regime(max(signs, key=REGIMES.index))
        if self._lends:
            orders += self._budget_orders(nodes)
        return orders + self._tell_scaling(scaling, now)

    def _duty(self, node: NodeView) -> Duty:
        moved = self.moved.get(node.descriptor.node)
        if moved is not None:
            return moved.duty
        match node.descriptor.role:
            case "prefill":
                return "prefill"
            case "decode":
                return "decode"
            case _:
                return "both"

    def _duties(self, nodes: Iterable[NodeView]) -> dict[str, Duty]:
        return {node.node_id: self._duty(node) for node in nodes}

    # --- moving nodes ------------------------------------------------------------------------------

    def _window(self, demand: Demand, nodes: Sequence[NodeView], since: float, now: float) -> Window | None:
        return demand.window(since, now, max(1, len(nodes) // NODES_PER_PLAY), MAX_REQUESTS)

    def _move_nodes(
        self, model: str, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> None:
        """Move a node if that serves more of what came in some window: one at a time, to see what it does."""
        if demand.known_for_s(now) < WINDOWS_S[0]:
            return
        proposed = self._propose_move(model, nodes, demand, lengths, now)
        kind = None if proposed is None else (self._duty(proposed[0].node), proposed[0].duty)
        # The play depends on the moment: a move must be found at two ticks in a row.
        is_confirmed = kind is not None and kind == self._proposed.get(model)
        self._proposed[model] = None if is_confirmed else kind
        if proposed is not None and is_confirmed:
            move, since = proposed
            before, moved_at = self._last_moves.get(model, (move.duty, now))
            num_turns = self._num_turns.get(model, 0) if now - moved_at < REMEMBERED_S else 0
            self._num_turns[model] = num_turns + (move.duty != before)
            self._give(*move, now)
            self._last_moves[model] = move.duty, now
            self._since[model] = since

    def _propose_move(
        self, model: str, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> tuple[Move, float] | None:
        """A move, and since when what came speaks for it."""
        duties, forgotten = self._duties(nodes), self._since.get(model, -math.inf)
        # Who has turned back often needs better reasons each time.
        num_errors = NUM_ERRORS + min(MOST_TURNS, self._num_turns.get(model, 0))
        for window_s in WINDOWS_S:
            window = self._window(demand, nodes, max(now - window_s, forgotten), now)
            if window is not None and len(window.wanted) >= MIN_REQUESTS:
                ahead = LookAhead(nodes, duties, window, lengths, self._goals, now)
                # No more can be won back than was lost. The shortest window is asked before anything is lost.
                most = window.num_lost if window_s > WINDOWS_S[0] else len(window.wanted) * window.stands_for
                most = most * ahead.num_repeats // window.stands_for
                move = self._best_move(ahead, duties, most, num_errors)
                # Many may be late for one that is giant, and that one is no reason.
                if (
                    move is not None
                    and not self._undoes_last(model, move, now)
                    and self._best_move(ahead.without_heaviest(duties), duties, most, num_errors)
                ):
                    return move, now - window.span_s
            if now - window_s <= forgotten:
                break  # longer windows see no more
        return None

    def _undoes_last(self, model: str, move: Move, now: float) -> bool:
        """It goes against a move whose effect no window has seen yet."""
        duty, moved_at = self._last_moves.get(model, (move.duty, -math.inf))
        return move.duty != duty and now - moved_at < WINDOWS_S[0]

    def _best_move(
        self, ahead: LookAhead, duties: dict[str, Duty], most: int, num_errors: float
    ) -> Move | None:
        """The move that serves the most more in time, `most` at most; None if that may be chance."""
        before = ahead.served(duties)
        num = len(before)
        if min(most, num - sum(before)) < MIN_GAIN * num:
            return None
        # Of nodes that are alike the one that is free first.
        alike: dict[tuple[Duty, Duty, int], tuple[float, NodeView]] = {}
        for node in ahead.nodes:
            mine = duties[node.node_id]
            for duty in _other_duties(duties, node):
                key = mine, duty, speed_class(node.speed.prefill_token_s)
                alike[key] = min(
                    alike.get(key, (math.inf, node)), (_busy_s(node, mine), node), key=lambda one: one[0]
                )
        best_gain, best = 0, None
        for (_, duty, _), (busy_s, node) in alike.items():
            after = ahead.served({**duties, node.node_id: duty}, node, busy_s)
            gain = min(most, sum(after) - sum(before))
            num_changed = sum(one != another for one, another in zip(before, after, strict=True))
            # Each request is played several times, which makes it no surer.
            error = math.sqrt(num_changed * ahead.num_repeats)
            if gain >= max(MIN_GAIN * num, num_errors * error) and gain > best_gain:
                role = node.descriptor.role
                reason = (
                    f"{'taken back' if duty == role else 'lent'} to {duty}: of the requests of the last "
                    f"{ahead.span_s:.0f} s {sum(after) / num:.0%} instead of {sum(before) / num:.0%} in time"
                )
                best_gain, best = gain, Move(node, duty, reason)
        return best

    def _fill_empty_side(self, model: str, nodes: Sequence[NodeView], now: float) -> None:
        """Lend a node to a side without nodes. Not at once: while nodes start, one side is often first."""
        for side in SIDES:
            key = model, side
            is_empty = all(self._duty(node) == other(side) for node in nodes)
            self._empty_ticks[key] = self._empty_ticks[key] + 1 if is_empty else 0
            if self._empty_ticks[key] >= NUM_TICKS:
                idlest = min(nodes, key=lambda node: (_busy_s(node, other(side)), node.node_id))
                duty: Duty = side if len(nodes) > 1 else "both"
                self._give(idlest, duty, f"lent to {duty}: no other node is there for {side}", now)

    def _give(self, node: NodeView, duty: Duty, reason: str, now: float) -> None:
        self.moved[node.descriptor.node] = Moved(duty, now, reason, self._budget_for(node, duty))

    def _adopt(self, nodes: Sequence[NodeView], now: float) -> None:
        """Take over what a leader before us has lent; let budgets follow the work."""
        # Nodes that have moved with all they have come first: of the others the last of a side serves both.
        for node in sorted(nodes, key=lambda node: node.chunk_budget not in _whole_budgets(node.descriptor)):
            ref, role = node.descriptor.node, node.descriptor.role
            whole = _whole_budgets(node.descriptor)
            home = starting_chunk_budget(role, *whole)
            moved = self.moved.get(ref)
            if moved is None:
                if node.chunk_budget != home and role in SIDES:
                    to: Side = "prefill" if node.chunk_budget > home else "decode"
                    is_last = all(self._duty(one) == to for one in nodes if one is not node)
                    duty: Duty = "both" if is_last else to
                    self.moved[ref] = Moved(duty, now, f"lent to {duty} by another leader", node.chunk_budget)
                continue
            if moved.duty == "both" or moved.chunk_budget not in whole:  # else it has arrived
                budget = self._budget_for(node, moved.duty)
                low, high = sorted((budget, moved.chunk_budget))
                if (budget in whole and moved.duty != "both") or high > ADJUST_RATIO * low:
                    self.moved[ref] = moved._replace(chunk_budget=budget)
            if moved.duty == role and node.chunk_budget == home and now - moved.since >= SETTLED_S:
                del self.moved[ref]

    def _budget_for(self, node: NodeView, duty: Duty) -> int:
        """All or nothing once the other work is done, until then as much as the ITL target allows."""
        token_budget, block_size = _whole_budgets(node.descriptor)
        if duty == "prefill" and not node.num_context_tokens:
            return token_budget
        if duty == "decode" and not node.num_queued_tokens:
            return block_size
        # Sequences that decode there now. Those to come from prompts that wait here must not delay these.
        num_sequences = node.report.num_running + node.report.num_waiting
        decode_s = node.speed.decode_step_s(num_sequences, node.report.num_context_tokens)
        chunk = max(0, int((self._goals.itl_s * SHARED_ITL - decode_s) / node.speed.prefill_token_s))
        # Over a block, since a budget of one block is a decode node's; no more if even this is too much.
        return max(block_size + 1, min(chunk, token_budget - 1))

    def _budget_orders(self, nodes: Sequence[NodeView]) -> list[Order]:
        """For each node whose report does not show its budget yet; repeated until it does."""
        return [
            SetPrefillCap(
                node=node.descriptor.node,
                epoch=NO_EPOCH,
                max_prefill_tokens_per_step=moved.chunk_budget,
                reason=moved.reason,
            )
            for node in nodes
            if (moved := self.moved.get(node.descriptor.node)) and moved.chunk_budget != node.chunk_budget
        ]

    # --- regimes and scaling -----------------------------------------------------------------------

    def _sign_of(self, nodes: Sequence[NodeView], demand: Demand | None, now: float) -> str:
        """Overload: requests were refused or late lately. Imbalance: nodes are on their way to a side."""
        moved = (self.moved.get(node.descriptor.node) for node in nodes)
        if any(one is not None and now - one.since < SETTLED_S for one in moved):
            return IMBALANCE
        window = self._window(demand, nodes, now - WINDOWS_S[0], now) if demand is not None else None
        if window is None or window.num_lost <= MIN_GAIN * len(window.wanted) * window.stands_for:
            return NORMAL
        return OVERLOAD

    def _change_regime(self, sign: str) -> list[Order]:
        self._num_ticks = self._num_ticks + 1 if sign == self._sign else 1
        self._sign = sign
        if sign == self.regime or (sign != IMBALANCE and self._num_ticks < NUM_TICKS):
            return []
        reasons = {
            NORMAL: "requests are served in time",
            IMBALANCE: "nodes move to the other side, more requests are served in time there",
            OVERLOAD: f"over {MIN_GAIN:.0%} of the last {WINDOWS_S[0]:.0f} s came too late or were refused",
        }
        before, self.regime = self.regime, sign
        return [RegimeChanged(epoch=NO_EPOCH, before=before, after=sign, reason=reasons[sign])]

    def _more_nodes(
        self, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> list[ScaleWanted]:
        """The fewest more nodes of one side that serve nearly all in time; twice as many at most."""
        window = self._window(demand, nodes, now - WINDOWS_S[1], now)
        if self.regime != OVERLOAD or window is None or now - self._scaled_at < SCALE_EVERY_S:
            return []
        duties = self._duties(nodes)
        ahead = LookAhead(nodes, duties, window, lengths, self._goals, now)
        num_served, side, num_more = max(
            (sum(ahead.served(duties, more=(side, num))), side, num)
            for side in SIDES
            for num in (1, len(nodes))
        )
        fewest = next(
            num
            for num in range(1, num_more + 1)
            if num == num_more or sum(ahead.served(duties, more=(side, num))) >= (1 - MIN_GAIN) * num_served
        )
        return [_wanted(side, fewest, f"{num_served / ahead.num_played:.0%} would be served in time")]

    def _could_do_with_fewer(
        self, model: str, nodes: Sequence[NodeView], demand: Demand | None, lengths: OutputLengths, now: float
    ) -> bool:
        """For `IDLE_S` by now."""
        duties = self._duties(nodes)
        side = _larger_side(duties)
        fewer = [
            node
            for node in nodes
            if node is not next(one for one in nodes if duties[one.node_id] != other(side))
        ]
        is_idle = len(nodes) > 2
        window = self._window(demand, nodes, now - WINDOWS_S[-1], now) if demand is not None else None
        if is_idle and window is not None:
            ahead = LookAhead(fewer, self._duties(fewer), window, lengths, self._goals, now)
            is_idle = not window.num_lost and all(ahead.served(self._duties(fewer)))
        if not is_idle:
            self._idle_since.pop(model, None)
            return False
        return now - self._idle_since.setdefault(model, now) >= IDLE_S

    def _fewer_nodes(self, nodes: Sequence[NodeView]) -> list[ScaleWanted]:
        side = _larger_side(self._duties(nodes))
        return [_wanted(side, -1, f"for {IDLE_S:.0f} s one fewer would have served all in time")]

    def _tell_scaling(self, scaling: list[ScaleWanted], now: float) -> list[Order]:
        """At most every `SCALE_EVERY_S`; and once that nodes are not wanted any more."""
        order = scaling[0] if scaling and now - self._scaled_at >= SCALE_EVERY_S else None
        orders: list[Order] = []
        if before := self._wanted:
            # While a node moves it is open whether that is enough.
            has_ended = self.regime == NORMAL if before.change > 0 else not scaling
            if order.role != before.role if order else has_ended:
                orders.append(_wanted(before.role, 0, "the need has ended"))
                self._wanted = None
        if order is not None:
            orders.append(order)
            self._wanted, self._scaled_at = order, now
        return orders


def _whole_budgets(descriptor: NodeDescriptor) -> tuple[int, int]:
    """Of a node that is all prefill, or all decode."""
    return descriptor.token_budget, descriptor.layout.block_size


def _other_duties(duties: Duties, node: NodeView) -> list[Duty]:
    """What the node could do instead. The last of a side stays there; in a cluster of two it may do both."""
    mine = duties[node.node_id]
    others = {duty for name, duty in duties.items() if name != node.node_id}
    if mine == "both":
        return [side for side in SIDES if others & {other(side), "both"}]
    if others & {mine, "both"}:
        return [other(mine)]
    return ["both"] if len(duties) == 2 else []


def _busy_s(node: NodeView, duty: Duty) -> float:
    """Until what it has of its duty is done."""
    if duty == "prefill":
        return node.prefill_wait_s
    return node.tokens_left / max(1, node.num_sequences) * node.step_s


def _larger_side(duties: Duties) -> Side:
    num_prefill = sum(duty == "prefill" for duty in duties.values())
    return "prefill" if 2 * num_prefill > len(duties) else "decode"


def _wanted(role: str, change: int, reason: str) -> ScaleWanted:
    return ScaleWanted(epoch=NO_EPOCH, role=role, change=change, reason=reason)
