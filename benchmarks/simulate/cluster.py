"""The simulated cluster: requests ask the scheduler, go to their nodes, and end.

Order as in docs/architecture.md: schedule, room at decode and prefill, prefill, first token, handoff, decode.
Two simplifications: a prompt takes its blocks on both sides at one moment, and those of its whole answer at
decode, so that nothing is ever preempted; it waits for room instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.simulate.batch import Prompt
from benchmarks.simulate.events import Events
from benchmarks.simulate.judge import Judge
from benchmarks.simulate.life import Life
from benchmarks.simulate.node import ASKED_NEW_TOKENS, FINGERPRINT, REPORT_PERIOD_S, SimNode
from benchmarks.traces import TOKENS_PER_HASH_ID
from flowkv_common.errors import FlowKVError
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_common.wire.nodes import BlocksChanged
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.rebalance import MoveCap, Order

# As `max_handoffs` in the settings of a node.
MAX_HANDOFFS = 16
# From an order of the scheduler to the node's report of it.
CONTROL_S = 0.001
# As `request_timeout_s` in the settings of the gateway.
REQUEST_TIMEOUT_S = 600.0
TIMEOUT_CODE = 504


class Cluster:
    """Runs `lives` to their ends, or until `judge` has seen enough.

    `watch` is called each period, to look and not to touch; `on_blocks` hears, as often, what the prefix
    caches have gained and lost.
    """

    def __init__(
        self,
        nodes: Sequence[SimNode],
        planner: Planner,
        lives: Sequence[Life],
        judge: Judge,
        watch: Callable[[float], None] = lambda now: None,
        on_blocks: Callable[[BlocksChanged], object] | None = None,
    ) -> None:
        self.nodes = nodes
        self.orders: list[tuple[float, Order]] = []
        self.num_events = 0
        self._planner = planner
        self._lives = lives
        self._judge = judge
        self._watch = watch
        self._on_blocks = on_blocks
        self._events = Events()
        self._by_id = {node.ref.node_id: node.index for node in nodes}
        self._num_open = len(lives)

    def run(self) -> None:
        """Until every request has ended, or too many have missed their targets."""
        links = {node.ref.node_id: node.kind.connector for node in self.nodes}
        for node in self.nodes:
            node.links = links
        self._planner.set_descriptors({node.ref.node_id: node.descriptor() for node in self.nodes})
        self._tick()
        for life in self._lives:
            self._events.at(life.request.arrival_s, partial(self._arrive, life))
        while self._num_open and not self._judge.has_failed and self._events.step():
            self.num_events += 1

    @property
    def now(self) -> float:
        return self._events.now

    # --- the scheduler ----------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.now
        for node in self.nodes:
            self._planner.add_report(node.report(now), now)
            if self._on_blocks is not None and (news := node.block_news()) is not None:
                self._on_blocks(news)
        for order in self._planner.tick(now):
            self.orders.append((now, order))
            if isinstance(order, MoveCap):
                node = self.nodes[self._by_id[order.node.node_id]]
                self._events.at(now + CONTROL_S, partial(self._move_cap, node, order.cap))
        self._watch(now)
        self._events.at(now + REPORT_PERIOD_S, self._tick)

    def _move_cap(self, node: SimNode, cap: int) -> None:
        node.batch.cap = cap
        self._changed(node)
        self._planner.add_report(node.report(self.now), self.now)

    def _arrive(self, life: Life) -> None:
        life.block_hashes = life.request.block_hashes(self.nodes[0].kind.layout.block_size)
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
            max_new_tokens=ASKED_NEW_TOKENS,
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
            self._judge.still_waits(life, self.now)
            return self._events.at(self.now + decision.retry_in_s, partial(self._ask, life))
        life.block_hashes = []
        life.prefill = self._by_id[decision.prefill.node_id]
        life.decode = self._by_id[decision.decode.node_id]
        node = self.nodes[life.prefill]
        node.line.append(life)
        node.num_prompts_accepted += 1
        self._start_line(node)

    def _refuse(self, life: Life, code: int) -> None:
        life.refused_with = code
        life.block_hashes = []
        self._judge.has_ended(life)
        self._num_open -= 1

    # --- the life of a request --------------------------------------------------------------------

    def _start_line(self, node: SimNode) -> None:
        """Start those of the line's first who find room on both sides; nobody overtakes for the same room."""
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
        decode, ids, request = self.nodes[life.decode], life.cacheable_ids, life.request
        num_all = request.num_prompt_tokens + request.num_output_tokens
        if not decode.pool.has_room(num_all, ids):
            full.add(decode.index)
            decode.blocked_senders[node.index] = None
            return False
        if node is not decode and not node.pool.has_room(request.num_prompt_tokens + 1, ids):
            full.add(node.index)
            node.blocked_senders[node.index] = None
            return False
        life.at_decode = decode.pool.take(num_all, ids)
        life.at_prefill = life.at_decode
        decode.num_rooms_given += 1
        if node is not decode:
            life.at_prefill = node.pool.take(request.num_prompt_tokens + 1, ids)
            node.num_sending += 1
            node.sending_tokens += request.num_prompt_tokens
        decode.batch.num_early_blocks += life.num_early_blocks(decode.kind.layout.block_size)
        life.num_cached_tokens = len(life.at_prefill.pinned) * TOKENS_PER_HASH_ID
        life.num_moved_tokens = request.num_prompt_tokens - len(life.at_decode.pinned) * TOKENS_PER_HASH_ID
        node.batch.prompts.append(Prompt(life, request.num_prompt_tokens, life.num_cached_tokens))
        # Behind a prompt that fills each step it changes none of them.
        if not node.batch.is_filled:
            self._changed(node)
        return True

    def _computed(self, node: SimNode, prompt: Prompt) -> None:
        """The first token. The KV goes to the decode node, if another one, unless that was all."""
        life = prompt.life
        assert life.at_prefill is not None, "it was computed in blocks"
        life.first_token_s = self.now
        self._judge.has_first_token(life)
        node.pool.commit(life.at_prefill, life.cacheable_ids)
        if life.request.num_output_tokens == 1:
            self._left_prefill(life)
            self._finish(life)
        elif life.prefill == life.decode:
            node.batch.waiting.append(life)
            node.num_sequences_accepted += 1
            self._changed(node)
        else:
            landed_at = node.send(life.num_moved_tokens, prompt.num_last, prompt.first_chunk_at, self.now)
            self._events.at(landed_at, partial(self._landed, life))

    def _landed(self, life: Life) -> None:
        node = self.nodes[life.decode]
        assert life.at_decode is not None, "it has landed in blocks"
        node.pool.commit(life.at_decode, life.cacheable_ids)
        node.batch.waiting.append(life)
        node.num_sequences_accepted += 1
        self._changed(node)
        self._left_prefill(life)

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
        node.lengths.see(life.request.num_output_tokens, stopped=True)
        life.at_decode = None
        life.last_token_s = self.now
        self._judge.has_ended(life)
        self._num_open -= 1
        self._freed(node)

    def _freed(self, node: SimNode) -> None:
        senders, node.blocked_senders = node.blocked_senders, {}
        for index in senders:
            self._start_line(self.nodes[index])

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
        stretch = node.batch.begin(self.now)
        if stretch is not None:
            self._wake_at(node, stretch.end_s)

    def _wake_at(self, node: SimNode, when: float) -> None:
        node.wake_at = when
        self._events.at(when, partial(self._wake, node, when))

    def _wake(self, node: SimNode, foreseen: float) -> None:
        if node.wake_at != foreseen:
            return  # the stretch was cut
        node.wake_at = None
        node.is_ending = True
        ended = node.batch.end()
        for life in ended.sequences:
            self._finish(life)
        for prompt in ended.prompts:
            self._computed(node, prompt)
        node.is_ending = False
        self._begin(node)
