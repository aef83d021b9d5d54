"""The simulated cluster: requests ask the scheduler, go to their nodes, and end.

Order as in docs/architecture.md: schedule, room at decode and prefill, prefill, first token, handoff, decode.
Two simplifications: a prompt takes its blocks on both sides at one moment, and blocks for what sequences
produce are counted for all of a node together. As on a node, the newest gives way when they find none.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter

from benchmarks.simulator.batch import Life, Prompt
from benchmarks.simulator.node import FINGERPRINT, REPORT_PERIOD_S, SimNode
from flowkv.bench.traces import TOKENS_PER_HASH_ID, Targets, hashes_of
from flowkv_common.errors import FlowKVError, Full
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_common.wire.nodes import SetPrefillCap
from flowkv_scheduler.planner import TICK_PERIOD_S, Planner
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import at_once

# As `max_handoffs` in the settings of a node.
MAX_HANDOFFS = 16
# A message's way: to a node, or from it.
CONTROL_S = 0.001
# As `request_timeout_s` in the settings of the gateway.
REQUEST_TIMEOUT_S = 600.0
TIMEOUT_CODE = 504


class Cluster:
    """Runs `lives` to their ends, or until more than `max_bad` of them miss the targets (None: never)."""

    def __init__(
        self,
        nodes: Sequence[SimNode],
        planner: Planner,
        lives: Sequence[Life],
        targets: Targets,
        max_bad: int | None = None,
    ) -> None:
        self.nodes = nodes
        self.now = 0.0
        self.num_bad = 0
        self.orders: list[tuple[float, Order]] = []
        self._planner = planner
        self._lives = lives
        self._targets = targets
        self._max_bad = max_bad
        self._events: list[tuple[float, int, Callable[[], None]]] = []  # a heap: when, in which order, what
        self._num_events = 0
        self.num_preempted = 0
        self._by_id = {node.ref.node_id: node for node in nodes}
        self._num_open = len(lives)

    @property
    def has_failed(self) -> bool:
        return self._max_bad is not None and self.num_bad > self._max_bad

    def run(self) -> None:
        self._planner.set_descriptors({node.ref.node_id: node.descriptor() for node in self.nodes})
        for place, node in enumerate(self.nodes):
            self._planner.add_report(node.report(0.0), 0.0)
            # Each node has its own clock, and so has the scheduler.
            phase_s = REPORT_PERIOD_S * place / len(self.nodes)
            self._at(phase_s, partial(self._report, node, 0))
            self._at(phase_s, partial(self._tell_blocks, node))
        self._at(REPORT_PERIOD_S / 3, self._tick)
        for life in self._lives:
            self._at(life.request.arrival_s, partial(self._arrive, life))
        while self._num_open and not self.has_failed and self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def _at(self, when: float, what: Callable[[], None]) -> None:
        """`what` happens at `when`, or now if that has passed; at one moment, in the order of the calls."""
        self._num_events += 1
        heapq.heappush(self._events, (max(when, self.now), self._num_events, what))

    def _count_bad(self, life: Life, misses: bool) -> None:
        if misses and not life.is_bad:
            life.is_bad = True
            self.num_bad += 1

    # --- the scheduler ----------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.now
        for order in at_once(self._planner.tick(now)):
            self.orders.append((now, order))
            if isinstance(order, SetPrefillCap):
                node = self._by_id[order.node.node_id]
                self._at(now + CONTROL_S, partial(self._move_cap, node, order.max_prefill_tokens_per_step))
        self._at(now + TICK_PERIOD_S, self._tick)

    def _move_cap(self, node: SimNode, cap: int) -> None:
        node.batch.cap = cap
        self._changed(node)
        self._report_soon(node)

    def _report(self, node: SimNode, number: int) -> None:
        """A period after the last report, or when something has changed; unless there was one since."""
        if number != node.num_reports:
            return
        node.num_reports += 1
        self._planner.add_report(node.report(self.now), self.now)
        self._at(self.now + REPORT_PERIOD_S, partial(self._report, node, node.num_reports))

    def _report_soon(self, node: SimNode) -> None:
        self._at(self.now + CONTROL_S, partial(self._report, node, node.num_reports))

    def _tell_blocks(self, node: SimNode) -> None:
        self._commit_computed(node)
        if (news := node.block_news()) is not None:
            self._planner.state.prefixes.apply_change(news)
        self._at(self.now + REPORT_PERIOD_S, partial(self._tell_blocks, node))

    def _arrive(self, life: Life) -> None:
        life.pieces = life.request.pieces(self.nodes[0].kind.layout.block_size)
        life.block_hashes = hashes_of(life.pieces)
        self._ask(life)

    def _ask(self, life: Life) -> None:
        age_s = self.now - life.request.arrival_s
        if age_s > REQUEST_TIMEOUT_S:
            return self._refuse(life, TIMEOUT_CODE)
        request = ScheduleRequest(
            request_id=str(life.number),
            attempt=0,
            fingerprint=FINGERPRINT,
            num_prompt_tokens=life.request.num_prompt_tokens,
            max_new_tokens=life.request.max_tokens,
            age_s=age_s,
            deadline_in_s=REQUEST_TIMEOUT_S - age_s,
            block_hashes=life.block_hashes,
        )
        try:
            decision = self._planner.schedule(request, self.now)
        except FlowKVError as error:
            return self._refuse(life, error.code)
        if isinstance(decision, Wait):
            life.num_waits += 1
            self._count_bad(life, age_s > self._targets.ttft_s)
            return self._at(self.now + decision.retry_in_s, partial(self._ask, life))
        life.block_hashes = []
        life.due_s = self.now + decision.due_in_s
        life.interruptible_until_s = self.now + decision.interruptible_for_s
        node = self._by_id[decision.prefill.node_id]
        life.prefill, life.decode = node.index, self._by_id[decision.decode.node_id].index
        self._at(self.now + CONTROL_S, partial(self._accept, node, life))

    def _accept(self, node: SimNode, life: Life) -> None:
        insort(node.line, life, key=attrgetter("due_s"))
        node.num_prompts_accepted += 1
        self._report_soon(node)
        self._start_line(node)

    def _refuse(self, life: Life, code: int) -> None:
        life.refused_with = code
        life.block_hashes = []
        self._count_bad(life, True)
        self._num_open -= 1

    # --- a request on its nodes -------------------------------------------------------------------

    def _start_line(self, node: SimNode) -> None:
        """Start the line's first requests that find room on both sides; none overtakes for the same room."""
        if node.line:
            self._commit_computed(node)
        full: set[int] = set()
        waiting: list[Life] = []
        while node.line and len(waiting) + node.num_sending < MAX_HANDOFFS:
            life = node.line.popleft()
            if life.decode in full or not self._try_start(node, life, full):
                waiting.append(life)
                if node.index in full:
                    break
        node.line.extendleft(reversed(waiting))

    def _try_start(self, node: SimNode, life: Life, full: set[int]) -> bool:
        """Blocks on both sides, or none, and then the sides that lack room are `full`."""
        decode, pieces, request = self.nodes[life.decode], life.pieces, life.request
        # As decode nodes do: else a newcomer would preempt running sequences, and starve preempted ones.
        block_size = decode.kind.layout.block_size
        num_owed = decode.num_blocks_owed(self.now) * block_size
        if not decode.pool.has_room(request.num_prompt_tokens + 1 + num_owed, pieces):
            full.add(decode.index)
            decode.blocked_senders[node.index] = None
            return False
        if node is not decode and not node.pool.has_room(request.num_prompt_tokens + 1, pieces):
            full.add(node.index)
            node.blocked_senders[node.index] = None
            return False
        life.at_decode = life.at_prefill = decode.pool.lease(request.num_prompt_tokens + 1, pieces)
        decode.num_rooms_given += 1
        if node is not decode:
            self._changed(decode)  # its sequences may grow into less
            life.at_prefill = node.pool.lease(request.num_prompt_tokens + 1, pieces)
            node.num_sending += 1
            node.sending_tokens += request.num_prompt_tokens
        life.num_cached_tokens = life.num_cached_in(life.at_prefill, block_size)
        life.num_moved_tokens = request.num_prompt_tokens - life.num_cached_in(life.at_decode, block_size)
        prompt = Prompt(life, request.num_prompt_tokens, life.num_cached_tokens, life.due_s)
        is_first, stretch = node.batch.add_prompt(prompt), node.batch.stretch
        if is_first or stretch is None or not stretch.prompt_tokens:
            self._changed(node)  # else it is behind a prompt that fills each step, and changes none of them
        return True

    def _commit_computed(self, node: SimNode) -> None:
        """Cached are also prompts that are being computed, as far as they are."""
        for life, num_computed, _ in node.batch.queued(self.now):
            if life.at_prefill is not None:
                node.pool.commit(life.at_prefill, life.pieces[: num_computed // TOKENS_PER_HASH_ID])

    def _computed(self, node: SimNode, prompt: Prompt) -> None:
        """The first token. The KV goes to the decode node, if another one, unless that was all."""
        life = prompt.life
        if life.first_token_s:  # again, after it was preempted
            node.batch.waiting.append(life)
            return
        assert life.at_prefill is not None, "it was computed in blocks"
        life.first_token_s = life.newest_token_s = self.now
        life.interruptible_until_s = 0.0  # if it is computed again
        life.num_produced = 1
        self._count_bad(life, life.ttft_s > self._targets.ttft_s)
        node.pool.commit(life.at_prefill, life.pieces)
        if life.request.num_output_tokens == 1:
            self._left_prefill(life)
            self._finish(life)
        elif life.prefill == life.decode:
            self._decode(node, life)
        else:
            landed_at = node.send_kv(life.num_moved_tokens, prompt.num_last, prompt.first_chunk_at, self.now)
            self._at(landed_at, partial(self._landed, life))

    def _landed(self, life: Life) -> None:
        node = self.nodes[life.decode]
        assert life.at_decode is not None, "it has landed in blocks"
        node.pool.commit(life.at_decode, life.pieces)
        self._decode(node, life)
        self._left_prefill(life)

    def _decode(self, node: SimNode, life: Life) -> None:
        node.batch.waiting.append(life)
        node.num_sequences_accepted += 1
        self._report_soon(node)
        self._changed(node)

    def _left_prefill(self, life: Life) -> None:
        node = self.nodes[life.prefill]
        if life.prefill != life.decode:
            assert life.at_prefill is not None
            node.num_sending -= 1
            node.sending_tokens -= life.request.num_prompt_tokens
            node.pool.release(life.at_prefill)
            self._freed(node)
            self._start_line(node)
        life.at_prefill = None

    def _finish(self, life: Life) -> None:
        node = self.nodes[life.decode]
        assert life.at_decode is not None, "it ran in blocks"
        node.pool.release(life.at_decode)
        num_tokens = life.request.num_output_tokens
        stopped = num_tokens < life.request.max_tokens
        node.lengths.observe(life.request.num_prompt_tokens, num_tokens, stopped=stopped)
        life.at_decode = None
        life.last_token_s = self.now
        self._count_bad(life, not self._targets.are_met(life.ttft_s, life.tpot_s))
        self._num_open -= 1
        self._freed(node)

    def _freed(self, node: SimNode) -> None:
        if node.preempted:
            self._changed(node)
        senders, node.blocked_senders = node.blocked_senders, {}
        for index in senders:  # when what had grown is free too: the pool hears of it with the next stretch
            self._at(self.now, partial(self._start_line, self.nodes[index]))

    # --- the engines ------------------------------------------------------------------------------

    def _changed(self, node: SimNode) -> None:
        """The node's work or cap is another: the step in flight ends as it was, then a new stretch begins."""
        if node.is_ending:
            return
        if node.batch.stretch is None:
            self._begin(node)
        elif node.batch.cut(self.now):
            self._wake_at(node, node.batch.stretch.end_s)

    def _begin(self, node: SimNode) -> None:
        batch, pool = node.batch, node.pool
        while not pool.grow_to(batch.num_grown):
            life = batch.preempt_newest(self.now)
            assert life.at_decode is not None
            pool.release(life.at_decode)
            life.at_decode = None
            self.num_preempted += 1
            if life.num_tokens + 1 > pool.num_blocks * node.kind.layout.block_size:
                self._refuse(life, Full.code)  # it has outgrown the node
                self._at(self.now, partial(self._freed, node))
            else:
                node.preempted.appendleft(life)
        while node.preempted:
            life = node.preempted[0]
            num_tokens = life.num_tokens
            if not pool.has_room(num_tokens + 1, life.pieces):
                break
            life.at_decode = pool.lease(life.request.num_prompt_tokens + 1, life.pieces)
            num_cached = life.num_cached_in(life.at_decode, node.kind.layout.block_size)
            batch.add_prompt(Prompt(life, num_tokens, num_cached, -math.inf))  # before all prompts
            node.preempted.popleft()
        num_free = (pool.num_free + pool.num_cached) * node.kind.layout.block_size
        stretch = batch.begin(self.now, num_free)
        if stretch is not None:
            self._wake_at(node, stretch.end_s)

    def _wake_at(self, node: SimNode, when: float) -> None:
        node.wake_at = when
        self._at(when, partial(self._wake, node, when))

    def _wake(self, node: SimNode, when: float) -> None:
        if node.wake_at != when:
            return  # the stretch was cut
        node.wake_at = None
        node.is_ending = True
        prompts, sequences = node.batch.end()
        for life in sequences:
            self._finish(life)
        for prompt in prompts:
            self._computed(node, prompt)
        node.is_ending = False
        self._begin(node)
