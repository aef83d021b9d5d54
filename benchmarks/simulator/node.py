"""A simulated node: its batch, its pool, its link, and the reports that are all the scheduler sees of it."""

from __future__ import annotations

from collections import deque

from benchmarks.simulator.batch import Batch, Histogram, Life, slowed
from benchmarks.simulator.kinds import NodeKind
from benchmarks.simulator.pool import Pool
from flowkv.bench.traces import hashes_of
from flowkv_common.wire.messages import ModelCard, NodeRef
from flowkv_common.wire.nodes import (
    BlockCounts,
    BlocksChanged,
    LoadReport,
    NodeDescriptor,
    num_attended,
    starting_chunk_budget,
)
from flowkv_node.measures import OutputLengths

REPORT_PERIOD_S = 0.5
FINGERPRINT = "simulated"


class SimNode:
    """`slow` multiplies the cost of its steps. `chunk`: the prefill chunk budget, that of its role if 0."""

    def __init__(
        self,
        index: int,
        kind: NodeKind,
        role: str,
        itl: Histogram,
        slow: float = 1.0,
        chunk: int = 0,
    ) -> None:
        self.index = index
        self.kind = kind
        self.role = role
        self.ref = NodeRef(node_id=f"node-{index:04}", incarnation="0")
        cap = chunk or starting_chunk_budget(role, kind.token_budget, kind.layout.block_size)
        self.batch = Batch(slowed(kind.fit, slow), kind.limits, cap, itl)
        self.pool = Pool(kind.num_blocks, kind.layout.block_size)
        self.line: deque[Life] = deque()  # prompts that wait for blocks on both sides, as they are due
        self.blocked_senders: dict[int, None] = {}  # nodes with a line that waits for blocks here
        self.preempted: deque[Life] = deque()  # to be computed again
        self.num_sending = 0
        self.sending_tokens = 0
        self.wake_at: float | None = None  # the end of the running stretch
        self.is_ending = False  # between two stretches: the next one will see all changes
        self.lengths = OutputLengths()
        self.num_prompts_accepted = 0
        self.num_rooms_given = 0
        self.num_sequences_accepted = 0
        self.num_reports = 0
        self._link_free_at = 0.0
        self._seq = 0
        self._blocks_seq = 0
        self._last_report: LoadReport | None = None
        self._was_idle = False  # at the last report
        self._reported_cap = cap

    def send_kv(self, num_tokens: int, num_last: int, first_chunk_at: float, now: float) -> float:
        """When the KV of a prompt has landed, whose last chunk of `num_last` tokens ended now.

        Earlier chunks were sent from the end of the first on, while others computed. All handoffs share the
        node's link, in order.
        """
        token_s = self.kind.token_bytes / self.kind.link_bytes_per_s
        num_late = min(num_tokens, num_last)
        early_sent_at = max(self._link_free_at, first_chunk_at) + (num_tokens - num_late) * token_s
        self._link_free_at = max(early_sent_at, now) + num_late * token_s
        return self._link_free_at + self.kind.link_latency_s

    def num_blocks_growing(self, now: float) -> int:
        """Blocks that sequences have grown into, though the pool will know of it when the stretch ends."""
        return (self.batch.num_grown_at(now) - self.batch.num_grown) // self.kind.layout.block_size

    def num_blocks_owed(self, now: float) -> int:
        """Blocks that sequences here need before anyone new: one to grow each, or all of them again."""
        size = self.kind.layout.block_size
        again = sum(-(-(life.num_tokens + 1) // size) for life in self.preempted)
        return self.num_blocks_growing(now) + self.batch.num_decoding + again

    def descriptor(self) -> NodeDescriptor:
        return NodeDescriptor(
            node=self.ref,
            role=self.role,
            model=ModelCard(
                name=self.kind.name,
                fingerprint=FINGERPRINT,
                max_model_len=self.kind.max_model_len,
                vocab_size=1,
                eos_token_ids=[],
            ),
            layout=self.kind.layout,
            num_blocks=self.kind.num_blocks,
            token_budget=self.kind.token_budget,
            max_prefill_tokens_per_step=self.batch.cap,
            hosted_roles=["prefill", "decode"],
            connectors=["tcp"],
            host=self.ref.node_id,
            pid=1,
            metrics_url="",
            version="simulated",
        )

    def block_news(self) -> BlocksChanged | None:
        """What the prefix cache has gained and lost since the last call; None if nothing."""
        stored, removed = self.pool.take_news()
        if not stored and not removed:
            return None
        self._blocks_seq += 1
        names = dict.fromkeys(hashes_of(stored))
        return BlocksChanged(
            node=self.ref,
            seq=self._blocks_seq,
            stored=list(names),
            # Another end of the same id may have come.
            removed=[name for name in hashes_of(removed) if name not in names],
        )

    def report(self, now: float) -> LoadReport:
        """What the node would publish at `now`; the last report again if it has been idle since."""
        has_work = self.batch.stretch is not None or bool(self.line) or self.num_sending > 0
        is_idle = not has_work and self.batch.cap == self._reported_cap
        last = self._last_report
        if last and is_idle and self._was_idle and last.num_rooms_given == self.num_rooms_given:
            return last
        self._was_idle, self._reported_cap = is_idle, self.batch.cap
        self._seq += 1
        self._last_report = self._snapshot(now)
        return self._last_report

    def _snapshot(self, now: float) -> LoadReport:
        batch, pool = self.batch, self.pool
        num_free = max(0, pool.num_free - self.num_blocks_growing(now))
        queued = [(life, 0, life.request.num_prompt_tokens) for life in self.line] + list(batch.queued(now))
        late = [one for one in queued if now < one[0].interruptible_until_s]
        return LoadReport(
            node=self.ref,
            seq=self._seq,
            period_s=REPORT_PERIOD_S,
            ready=True,
            draining=False,
            max_prefill_tokens_per_step=batch.cap,
            queued_prefill_tokens=sum(num_left for _, _, num_left in queued),
            num_waiting=len(batch.waiting) + len(self.preempted),
            num_running=batch.num_decoding,
            max_num_seqs=self.kind.max_num_seqs,
            blocks=BlockCounts(
                total=pool.num_blocks,
                free=num_free,
                cached=pool.num_cached,
                leased=pool.num_blocks - num_free - pool.num_cached,
                quarantined=0,
                longest_free_run=num_free,
            ),
            prefill_tokens_per_s=batch.prefill_tokens_per_s,
            decode_step_s=batch.decode_step_s,
            num_handoffs=self.num_sending,
            handoff_bytes=int(self.sending_tokens * self.kind.token_bytes),
            num_prompts=len(self.line) + len(batch.prompts),
            num_context_tokens=batch.num_context_at(now),
            num_prompts_accepted=self.num_prompts_accepted,
            num_rooms_given=self.num_rooms_given,
            num_sequences_accepted=self.num_sequences_accepted,
            step=batch.fitter.fit(),
            forecast=self.lengths.forecast(batch.outputs_at(now)),
            usual_connector=self.kind.connector,
            interruptible_prefill_tokens=sum(num_left for _, _, num_left in late),
            queued_attended=sum(num_attended(num_left, num_computed) for _, num_computed, num_left in queued),
            interruptible_attended=sum(
                num_attended(num_left, num_computed) for _, num_computed, num_left in late
            ),
        )
