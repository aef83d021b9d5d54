"""Rebalancing: which nodes prefill, which decode, which do both; and whether nodes are wanted.

A node is moved where a look ahead (`lookahead.py`) says that more requests would be served in time, for more
than a chance. It stays where it is until that is said of another side: going home is a move like any other.
What moves is the node's prefill chunk budget. Called once per period with all usable nodes; the same calls
give the same orders. Pure: `now` is seconds of any clock.

A tick goes in slices. It sees all as it was when it began.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter, ne
from typing import NamedTuple

import msgspec

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import (
    REGIMES,
    NodeDescriptor,
    RegimeChanged,
    ScaleWanted,
    SetPrefillCap,
    starting_chunk_budget,
)
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.demand import REMEMBERED_S, Demand, OutputLengths, Window
from flowkv_scheduler.lookahead import Duties, Duty, LookAhead, Side, num_repeats
from flowkv_scheduler.node_view import NodeView, shared_chunk, speed_class
from flowkv_scheduler.slices import Sliced

# Played are the requests of the last so many seconds, the shortest time first: there a change shows first.
# A move forgets what came before its window, for that was another traffic.
WINDOWS_S = (2.5, 10.0, 40.0, 160.0)
# Fewer requests say nothing. So the shortest is only for those that come fast.
FEWEST_REQUESTS = (100, 10, 10, 10)
# Played is one per tick, in this order, as places in `WINDOWS_S`.
TURNS = (0, 1, 0, 2, 0, 1, 0, 3)
# By what came in so many seconds nodes are moved before anything is lost, and the regime is told.
RECENT_S = WINDOWS_S[1]
# So many are played in some milliseconds. A tick plays them a few times.
MAX_PLAYED = 400
# From so many nodes on only some of the requests are played, on as few decode nodes. But on no fewer than so
# many, however many requests come: a prompt takes the time of all that it stands for, and the next one waits.
MOST_NODES = 16
LEAST_NODES = 4
# A move must serve this share more of the requests in time, and so many times the standard error of that.
MIN_GAIN = 0.03
NUM_ERRORS = 2.0
# And one more for each time that a move went against the one before, up to so many.
MOST_TURNS = 3
# A sign must last for so many ticks.
NUM_TICKS = 2
# A moved node's budget follows its work when it is off by this factor: else each tick would bring an order.
ADJUST_RATIO = 1.25
# The last sequence of a node ends so many times later than if outputs ended at random: some still wait for
# their prompts elsewhere, and a few outputs become far longer than others. Simulated: 1.4 to 3.6 times.
LAST_ENDS_LATER = 2.0
# A node that is at home again is followed for so long.
SETTLED_S = 3.0
# A cluster that would do with one node fewer for so long is told so.
IDLE_S = 60.0
# Between two requests for more or fewer nodes.
SCALE_EVERY_S = 10.0

NORMAL, IMBALANCE, OVERLOAD = REGIMES
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
    fills: Side | None = None  # the side that had no other node


class Move(NamedTuple):
    node_ids: Sequence[str]
    before: Duty
    duty: Duty
    reason: str


@dataclass(slots=True)
class Past:
    """What is remembered of one model and its nodes."""

    name: str = ""  # of the model
    regime: str = NORMAL
    sign: str = NORMAL
    num_ticks: int = 0  # that the sign has lasted
    scaled_at: float = -math.inf
    wanted: ScaleWanted | None = None  # as last told, while it stands

    since: float = -math.inf  # what came before is forgotten
    turn: int = 0  # place in `TURNS`
    proposed: tuple[Duty, Duty] | None = None  # at the last tick: from, to
    moved_to: Duty | None = None  # the last move
    moved_at: float = -math.inf
    num_turns: int = 0  # how often a move went against the one before
    empty_ticks: dict[Side, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    idle_since: float = math.inf  # one node fewer would do
    idle_played_at: float = -math.inf


class Rebalancer:
    """Remembers the regime of each model, and which nodes it has moved and when."""

    def __init__(self, goals: Goals, *, lends: bool = True) -> None:
        self.moved: dict[NodeRef, Moved] = {}
        self._known: set[NodeRef] = set()
        self._models: set[str] = set()  # that have nodes, by fingerprint
        self._goals = goals
        self._lends = lends
        self._pasts: defaultdict[str, Past] = defaultdict(Past)

    @property
    def regime(self) -> str:
        """The worst of all models."""
        return max((past.regime for past in self._pasts.values()), key=REGIMES.index, default=NORMAL)

    @property
    def leaving(self) -> Mapping[str, Side]:
        """Nodes that shall get nothing new on a side, though their budget would still allow it."""
        return {ref.node_id: other(moved.duty) for ref, moved in self.moved.items() if moved.duty != "both"}

    def set_descriptors(self, registry: Iterable[NodeDescriptor]) -> None:
        """Forget lives that ended. A node that is only silent is still where it was moved to."""
        registry = list(registry)
        self._known = {descriptor.node for descriptor in registry}
        self._models = {descriptor.model.fingerprint for descriptor in registry}
        self.moved = {ref: moved for ref, moved in self.moved.items() if ref in self._known}

    def tick(
        self,
        nodes: Sequence[NodeView],
        demands: Mapping[str, Demand],
        lengths: Mapping[str, OutputLengths],
        now: float,
    ) -> Sliced[list[Order]]:
        """What should change now. Demands and lengths are by the fingerprint of the model."""
        nodes = sorted(nodes, key=attrgetter("node_id"))
        self._known.update(node.descriptor.node for node in nodes)
        # Models whose nodes have gone, too: what was told of them has ended.
        by_model: dict[str, list[NodeView]] = {model: [] for model in self._pasts}
        for node in nodes:
            card = node.descriptor.model
            by_model.setdefault(card.fingerprint, []).append(node)
            self._pasts[card.fingerprint].name = card.name
        if self._lends:
            for model, members in by_model.items():
                if members:
                    self._adopt(members, now)
                    self._fill_empty_side(self._pasts[model], members, now)
        yield
        regimes, scaling = list[Order](), list[Order]()
        for model, members in by_model.items():
            past, sign, wanted = self._pasts[model], NORMAL, list[ScaleWanted]()
            if members:
                demand = demands.get(model)
                sign, wanted = yield from self._look_after(past, members, demand, lengths[model], now)
            yield
            regimes += _of_model(past.name, self._change_regime(past, sign))
            scaling += _of_model(past.name, self._tell_scaling(past, wanted, now))
            if not members and model not in self._models and past.regime == NORMAL and past.wanted is None:
                del self._pasts[model]
        return [*regimes, *(self._budget_orders(nodes) if self._lends else ()), *scaling]

    def _look_after(
        self, past: Past, nodes: Sequence[NodeView], demand: Demand | None, lengths: OutputLengths, now: float
    ) -> Sliced[tuple[str, list[ScaleWanted]]]:
        """Move nodes of one model. Returns the sign for its regime, and nodes that are wanted or spare."""
        if self._lends and demand is not None:
            yield from self._move_nodes(past, nodes, demand, lengths, now)
        yield
        sign = self._sign_of(nodes, demand, now)
        yield
        if demand is not None and sign == OVERLOAD:
            return sign, (yield from self._more_nodes(past, nodes, demand, lengths, now))
        if (yield from self._could_do_with_fewer(past, nodes, demand, lengths, now)):
            return sign, self._fewer_nodes(nodes)
        return sign, []

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
        """Of fewer requests, on as much fewer nodes, where there are too many to play."""
        stands_for = max(1, len(nodes) // MOST_NODES)
        window = demand.window(since, now, stands_for, MAX_PLAYED)
        if window is None:
            return None
        excess = num_repeats(window) * len(window.wanted) / MAX_PLAYED
        fewer = min(math.ceil(excess * stands_for), len(nodes) // LEAST_NODES)
        return demand.window(since, now, fewer, MAX_PLAYED) if fewer > stands_for else window

    def _move_nodes(
        self, past: Past, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> Sliced[None]:
        """Move a node if that serves more of what came in some window: one at a time, to see what it does.

        Of a large cluster a part that is as large.
        """
        if now - past.moved_at >= REMEMBERED_S:
            past.num_turns = 0
        proposed = yield from self._propose_move(past, nodes, demand, lengths, now)
        kind = None if proposed is None else (proposed[0].before, proposed[0].duty)
        # The play depends on the moment: a move must be found at two ticks in a row.
        is_confirmed = kind is not None and kind == past.proposed
        past.proposed = None if is_confirmed else kind
        if proposed is not None and is_confirmed:
            move, past.since = proposed
            for node in nodes:
                if node.node_id in move.node_ids and node.descriptor.node in self._known:
                    verb = "taken back" if move.duty == node.descriptor.role else "lent"
                    self._give(node, move.duty, f"{verb} to {move.duty}: {move.reason}", now)
            past.num_turns += past.moved_to not in (None, move.duty)
            past.moved_to, past.moved_at = move.duty, now

    def _propose_move(
        self, past: Past, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> Sliced[tuple[Move, float] | None]:
        """A move, and since when what came speaks for it: by the next window that may, no more are played."""
        known_s = demand.known_for_s(now)
        for turn in (*range(past.turn, len(TURNS)), *range(past.turn)):
            number = TURNS[turn]
            window_s = WINDOWS_S[number]
            if known_s < min(window_s, RECENT_S):
                continue
            if number and now - WINDOWS_S[number - 1] <= past.since:
                continue  # a shorter one sees as much
            window = self._window(demand, nodes, max(now - window_s, past.since), now)
            yield
            if window is None or window.num_distinct < FEWEST_REQUESTS[number]:
                continue
            # No more can be won back than was lost, but what is lost soon.
            num = len(window.wanted)
            most = num if window_s <= RECENT_S else window.num_lost / window.stands_for
            if most < MIN_GAIN * num:
                continue
            move = yield from self._move_for(past, nodes, window, most, lengths, now)
            # What a window has found must be found there again.
            is_first = move is not None and past.proposed is None
            past.turn = turn if is_first else (turn + 1) % len(TURNS)
            return None if move is None else (move, now - window.span_s)
        return None

    def _move_for(
        self,
        past: Past,
        nodes: Sequence[NodeView],
        window: Window,
        most: float,
        lengths: OutputLengths,
        now: float,
    ) -> Sliced[Move | None]:
        """The best move for the window, if it is the best without its heaviest request too."""
        duties = self._duties(nodes)
        # Who has turned back often needs better reasons each time.
        num_errors = NUM_ERRORS + min(MOST_TURNS, past.num_turns)
        ahead = LookAhead(nodes, duties, window, lengths, self._goals, now)
        yield
        most *= ahead.num_repeats
        move = yield from self._best_move(ahead, duties, most, num_errors)
        if move is None:
            return None
        # It goes against a move whose effect the window has not seen yet.
        if move.duty != past.moved_to and now - past.moved_at < min(window.span_s, RECENT_S):
            return None
        # Many may be late for one that is giant, and that one is no reason.
        others = yield from ahead.without_heaviest()
        return move if (yield from self._best_move(others, duties, most, num_errors)) else None

    def _best_move(
        self, ahead: LookAhead, duties: dict[str, Duty], most: float, num_errors: float
    ) -> Sliced[Move | None]:
        """The move that serves the most more in time, `most` at most; None if that may be chance."""
        before = yield from ahead.served(duties)
        num = len(before)
        if min(most, num - sum(before)) < MIN_GAIN * num:
            return None
        alike: defaultdict[tuple[Duty, int], list[NodeView]] = defaultdict(list)
        for node in ahead.nodes:
            alike[duties[node.node_id], speed_class(node.speed.prefill_token_s)].append(node)
        counts = Counter(duties.values())
        best_gain, best = 0.0, None
        for (mine, _), members in alike.items():
            # Those that are free first; as many of a large cluster as a gain can be told of.
            in_order = sorted(members, key=lambda node: (_busy_s(node, mine), node.node_id))
            most_at_once = min(len(duties) // MOST_NODES, counts[mine] - 1) or 1
            for duty in _other_duties(counts, mine):
                first = _with_cores(in_order, mine, duty, ahead.nodes, duties)[:most_at_once]
                if not first:
                    continue
                moved, busy_s = [node.node_id for node in first], _busy_s(first[-1], mine)
                after = yield from ahead.served({**duties, **dict.fromkeys(moved, duty)}, moved, busy_s)
                gain = min(most, sum(after) - sum(before))
                num_changed = sum(map(ne, before, after))
                # A request that is played several times makes it no surer.
                error = math.sqrt(num_changed * ahead.num_played / ahead.num_distinct)
                if gain >= max(MIN_GAIN * num, num_errors * error) and gain > best_gain:
                    reason = (
                        f"of the requests of the last {ahead.span_s:.0f} s "
                        f"{sum(after) / num:.0%} instead of {sum(before) / num:.0%} in time"
                    )
                    best_gain, best = gain, Move(moved, mine, duty, reason)
        return best

    def _fill_empty_side(self, past: Past, nodes: Sequence[NodeView], now: float) -> None:
        """Lend a node to a side without nodes, until there is another one.

        Not at once: while nodes start, one side is often first.
        """
        for side in SIDES:
            serving = [node for node in nodes if self._duty(node) != other(side)]
            filling = [node for node in serving if self._fills(node) == side]
            if len(filling) < len(serving):
                for node in filling:
                    role = node.descriptor.role
                    home: Duty = role if role in SIDES else "both"
                    self._give(node, home, f"taken back to {home}: another node is there for {side}", now)
            is_empty = all(self._duty(node) == other(side) for node in nodes)
            past.empty_ticks[side] = past.empty_ticks[side] + 1 if is_empty else 0
            if past.empty_ticks[side] >= NUM_TICKS:
                idlest = min(nodes, key=lambda node: (_busy_s(node, other(side)), node.node_id))
                duty: Duty = side if len(nodes) > 1 else "both"
                self._give(idlest, duty, f"lent to {duty}: no other node is there for {side}", now, side)

    def _fills(self, node: NodeView) -> Side | None:
        moved = self.moved.get(node.descriptor.node)
        return moved.fills if moved else None

    def _give(self, node: NodeView, duty: Duty, reason: str, now: float, fills: Side | None = None) -> None:
        self.moved[node.descriptor.node] = Moved(duty, now, reason, self._budget_for(node, duty), fills)

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
            # Also of one that has arrived: a request that was late may come there yet.
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
        return shared_chunk(node, self._goals.itl_s)

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
        window = self._window(demand, nodes, now - RECENT_S, now) if demand is not None else None
        if window is None or window.num_lost <= MIN_GAIN * len(window.wanted) * window.stands_for:
            return NORMAL
        return OVERLOAD

    def _change_regime(self, past: Past, sign: str) -> list[RegimeChanged]:
        past.num_ticks = past.num_ticks + 1 if sign == past.sign else 1
        past.sign = sign
        if sign == past.regime or (sign != IMBALANCE and past.num_ticks < NUM_TICKS):
            return []
        reasons = {
            NORMAL: "requests are served in time",
            IMBALANCE: "nodes move to the other side, more requests are served in time there",
            OVERLOAD: f"over {MIN_GAIN:.0%} of the last {RECENT_S:.0f} s came too late or were refused",
        }
        before, past.regime = past.regime, sign
        return [RegimeChanged(epoch=NO_EPOCH, before=before, after=sign, reason=reasons[sign])]

    def _more_nodes(
        self, past: Past, nodes: Sequence[NodeView], demand: Demand, lengths: OutputLengths, now: float
    ) -> Sliced[list[ScaleWanted]]:
        """The fewest more nodes of one side that serve nearly all in time; twice as many at most."""
        window = self._window(demand, nodes, now - WINDOWS_S[2], now)
        if past.regime != OVERLOAD or window is None or now - past.scaled_at < SCALE_EVERY_S:
            return []
        yield
        ahead = LookAhead(nodes, self._duties(nodes), window, lengths, self._goals, now)
        yield
        num_served, side, num_more = 0, SIDES[0], 0
        for one in product(SIDES, (1, len(nodes))):
            served = yield from self._num_served(ahead, nodes, one)
            num_served, side, num_more = max((num_served, side, num_more), (served, *one))
        # One node fewer than `low` is too few, `num_more` are enough.
        low = 1
        while low < num_more:
            middle = (low + num_more) // 2
            if (yield from self._num_served(ahead, nodes, (side, middle))) < (1 - MIN_GAIN) * num_served:
                low = middle + 1
            else:
                num_more = middle
        return [_wanted(side, low, f"{num_served / ahead.num_played:.0%} would be served in time")]

    def _num_served(self, ahead: LookAhead, nodes: Sequence[NodeView], more: tuple[Side, int]) -> Sliced[int]:
        return sum((yield from ahead.served(self._duties(nodes), more=more)))

    def _could_do_with_fewer(
        self, past: Past, nodes: Sequence[NodeView], demand: Demand | None, lengths: OutputLengths, now: float
    ) -> Sliced[bool]:
        """For `IDLE_S` by now. Played as seldom as it is told."""
        if len(nodes) <= 2 or (demand is not None and demand.num_lost(now - WINDOWS_S[-1])):
            past.idle_since = math.inf
        elif now - past.idle_played_at >= SCALE_EVERY_S:
            past.idle_played_at = now
            window = self._window(demand, nodes, now - WINDOWS_S[-1], now) if demand is not None else None
            duties = self._duties(nodes)
            one = next(node for node in nodes if duties[node.node_id] != other(_larger_side(duties)))
            fewer = [node for node in nodes if node is not one]
            served = [True]
            if window is not None:
                yield
                ahead = LookAhead(fewer, duties, window, lengths, self._goals, now)
                served = yield from ahead.served(duties)
            past.idle_since = min(past.idle_since, now) if all(served) else math.inf
        return now - past.idle_since >= IDLE_S

    def _fewer_nodes(self, nodes: Sequence[NodeView]) -> list[ScaleWanted]:
        side = _larger_side(self._duties(nodes))
        return [_wanted(side, -1, f"for {IDLE_S:.0f} s one fewer would have served all in time")]

    def _tell_scaling(self, past: Past, scaling: list[ScaleWanted], now: float) -> list[ScaleWanted]:
        """At most every `SCALE_EVERY_S`; and once that nodes are not wanted any more."""
        order = scaling[0] if scaling and now - past.scaled_at >= SCALE_EVERY_S else None
        orders = list[ScaleWanted]()
        if before := past.wanted:
            # While a node moves it is open whether that is enough.
            has_ended = past.regime == NORMAL if before.change > 0 else not scaling
            if order.role != before.role if order else has_ended:
                orders.append(_wanted(before.role, 0, "the need has ended"))
                past.wanted = None
        if order is not None:
            orders.append(order)
            past.wanted, past.scaled_at = order, now
        return orders


def _of_model(name: str, orders: Iterable[RegimeChanged | ScaleWanted]) -> Iterator[Order]:
    return (msgspec.structs.replace(order, model=name) for order in orders)


def _whole_budgets(descriptor: NodeDescriptor) -> tuple[int, int]:
    """Of a node that is all prefill, or all decode."""
    return descriptor.token_budget, descriptor.layout.block_size


def _other_duties(counts: Counter[Duty], mine: Duty) -> list[Duty]:
    """What a node could do instead. The last of a side stays there; in a cluster of two it may do both."""
    others = (counts - Counter([mine])).keys()
    if mine == "both":
        return [side for side in SIDES if others & {other(side), "both"}]
    to_other: list[Duty] = [other(mine)] if others & {mine, "both"} else []
    return [*to_other, "both"] if counts.total() == 2 else to_other


def _with_cores(
    candidates: Iterable[NodeView], mine: Duty, duty: Duty, nodes: Iterable[NodeView], duties: Duties
) -> list[NodeView]:
    """Those whose hosts have cores for all nodes of the side that they would join; or that would be at home.

    A look ahead takes each node for as fast as it is. On cores that the side keeps busy already, one node
    more takes from the others what it computes, in smaller steps. On two cores four real nodes of a thread
    each lost 5 to 12 of 222 requests by lending, in each of three runs; with 0.4 of a core each they won 10
    of 206.
    """
    if mine == "both":
        return list(candidates)  # it leaves a side, and joins none
    taken = defaultdict[str, float](float)  # by those who serve the other side
    for node in nodes:
        if duties[node.node_id] != mine:
            taken[node.descriptor.boot_id] += node.descriptor.num_cores
    chosen = []
    for node in candidates:
        one = node.descriptor
        needed = taken[one.boot_id] + one.num_cores
        if not one.num_cores or not one.boot_id or duty == one.role or needed <= one.num_host_cores:
            chosen.append(node)
            taken[one.boot_id] += one.num_cores
    return chosen


def _busy_s(node: NodeView, duty: Duty) -> float:
    """Until what it has of its duty is done."""
    if duty == "prefill":
        return node.idle_wait_s
    if not node.num_sequences:
        return 0.0
    mean, base_s = node.tokens_left / node.num_sequences, node.speed.base_s
    # Each token adds its part to a step. Of outputs that end at random the last has so many steps to go.
    num_steps = mean * (1.0 + math.log(node.num_sequences))
    return LAST_ENDS_LATER * (mean * max(0.0, node.step_s - base_s) + num_steps * base_s)


def _larger_side(duties: Duties) -> Side:
    num_prefill = sum(duty == "prefill" for duty in duties.values())
    return "prefill" if 2 * num_prefill > len(duties) else "decode"


def _wanted(role: str, change: int, reason: str) -> ScaleWanted:
    return ScaleWanted(epoch=NO_EPOCH, role=role, change=change, reason=reason)
