"""What a gateway sees of nodes: first tokens against what was promised, and the gaps between tokens.

The scheduler believes nodes by it (`flowkv_scheduler/belief.py`). Pure: `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from flowkv_common.wire.messages import Assignment, NodeRef, NodeSeen, NodesSeen

# In one message: a scheduler takes a millisecond or two for them, between two decisions.
MAX_NODES_TOLD = 200


@dataclass(slots=True)
class _Attempt:
    prefill: NodeRef
    decode: NodeRef
    began_at: float
    promise_s: float | None  # until its first token; None: nothing more is expected of prefill
    token_at: float | None = None  # the last token from decode; None: none is expected now
    gap_s: float = 0.0  # before that token


@dataclass(slots=True)
class _Node:
    """Of one node: what has come since it was last told, and when something last came."""

    num_prompts: int = 0
    promised_s: float = 0.0
    taken_s: float = 0.0
    num_gaps: int = 0
    gaps_s: float = 0.0
    first_token_at: float = 0.0
    token_at: float = 0.0


class Witness:
    """Follows all attempts of a gateway. An attempt begins with its assignment."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._attempts: dict[str, _Attempt] = {}  # by transfer id
        self._nodes: defaultdict[NodeRef, _Node] = defaultdict(_Node)

    def begin(self, transfer_id: str, assignment: Assignment, now: float) -> None:
        self._attempts[transfer_id] = _Attempt(
            assignment.prefill, assignment.decode, now, assignment.promised_first_token_in_s
        )

    def add_tokens(self, transfer_id: str, node_id: str, num_tokens: int, now: float) -> None:
        """So many tokens of an attempt have come from the node; those of unknown attempts are ignored."""
        attempt = self._attempts.get(transfer_id)
        if attempt is None or not num_tokens:
            return
        if attempt.promise_s is not None:
            self._settle(attempt, attempt.promise_s, now)
            self._nodes[attempt.prefill].first_token_at = now
            if node_id == attempt.prefill.node_id:
                return  # what comes next from decode has a handoff before it
        if node_id != attempt.decode.node_id:
            return
        node = self._nodes[attempt.decode]
        if attempt.token_at is not None:
            attempt.gap_s = now - attempt.token_at
            node.num_gaps += num_tokens
            node.gaps_s += attempt.gap_s
        attempt.token_at = node.token_at = now

    def last_gap_s(self, transfer_id: str) -> float:
        """Between the last two tokens from decode; 0 if fewer have come."""
        attempt = self._attempts.get(transfer_id)
        return attempt.gap_s if attempt else 0.0

    def pause(self, transfer_id: str) -> None:
        """By a keepalive the node does not work at the attempt: it has been preempted."""
        if attempt := self._attempts.get(transfer_id):
            attempt.token_at = None

    def excuse_prefill(self, transfer_id: str) -> None:
        """It waits for its decode node, which has failed."""
        if attempt := self._attempts.get(transfer_id):
            attempt.promise_s = None

    def end(self, transfer_id: str, now: float, *, goes_on: bool = False) -> None:
        """The attempt is over. A promise that is overdue counts as kept now, no sooner.

        The same for the next token of one that `goes_on` elsewhere, if that was longer than the one before.
        """
        attempt = self._attempts.pop(transfer_id, None)
        if attempt is None:
            return
        if goes_on and attempt.token_at is not None and now - attempt.token_at > attempt.gap_s > 0.0:
            self._nodes[attempt.decode].num_gaps += 1
            self._nodes[attempt.decode].gaps_s += now - attempt.token_at
        if attempt.promise_s is None:
            return
        if now - attempt.began_at > attempt.promise_s:
            self._settle(attempt, attempt.promise_s, now)

    def forget_open(self) -> None:
        """Expect nothing of what is open: the silence was this gateway's own."""
        for attempt in self._attempts.values():
            attempt.promise_s = attempt.token_at = None

    def tell(self, now: float) -> Iterator[NodesSeen]:
        """What has come since the last call, and what is due now. Of nodes without either, nothing."""
        due_since: dict[NodeRef, float] = {}
        decoding: set[NodeRef] = set()
        for attempt in self._attempts.values():
            if attempt.promise_s is not None:
                due = attempt.began_at + attempt.promise_s
                if due < now:
                    due_since[attempt.prefill] = min(due, due_since.get(attempt.prefill, due))
            elif attempt.token_at is not None:
                decoding.add(attempt.decode)
        told = []
        for ref, node in [(ref, self._nodes[ref]) for ref in {*self._nodes, *due_since, *decoding}]:
            prompt_stall_s = now - max(due_since.get(ref, now), node.first_token_at)
            step_stall_s = now - node.token_at if ref in decoding else 0.0
            if node.num_prompts or node.num_gaps or prompt_stall_s or step_stall_s:
                told.append(
                    NodeSeen(
                        node=ref,
                        num_prompts=node.num_prompts,
                        promised_s=round(node.promised_s, 6),
                        taken_s=round(node.taken_s, 6),
                        num_gaps=node.num_gaps,
                        gaps_s=round(node.gaps_s, 6),
                        prompt_stall_s=round(prompt_stall_s, 3),
                        step_stall_s=round(step_stall_s, 3),
                    )
                )
        in_use = {ref for attempt in self._attempts.values() for ref in (attempt.prefill, attempt.decode)}
        self._nodes = defaultdict(
            _Node,
            {
                ref: _Node(first_token_at=node.first_token_at, token_at=node.token_at)
                for ref, node in self._nodes.items()
                if ref in in_use
            },
        )
        rest = iter(told)
        while nodes := list(islice(rest, MAX_NODES_TOLD)):
            yield NodesSeen(gateway_id=self._gateway_id, nodes=nodes)

    def _settle(self, attempt: _Attempt, promise_s: float, now: float) -> None:
        """Its first token has come, or won't."""
        node = self._nodes[attempt.prefill]
        node.num_prompts += 1
        node.promised_s += promise_s
        node.taken_s += now - attempt.began_at
        attempt.promise_s = None
