"""What has become of a request so far: its attempts, its output, and where its time went. Does no I/O."""

from __future__ import annotations

import time

from flowkv_common.errors import FlowKVError
from flowkv_common.phases import Phases
from flowkv_common.wire.messages import Assignment, RequestFinished, ScheduleRequest, TokenChunk, transfer_id
from flowkv_gateway.generation import Generation, Piece
from flowkv_gateway.prompt_hashes import MAX_HASHES, HashBasis, PromptHashes

SCHEDULER_PATIENCE_S = 10.0
# The phases before a first token in which nothing of the request is computed.
WAITS = ("schedule", "queue", "reserve")


class Journey:
    """One request from its arrival to its end, over all of its attempts."""

    def __init__(self, generation: Generation, max_hashes: int = MAX_HASHES) -> None:
        """`max_hashes`: of blocks, in a message to the scheduler."""
        self.generation = generation
        self.attempt = 0
        self.output_ids: list[int] = []
        self.avoid: set[str] = set()
        self._hashes = PromptHashes(max_hashes)
        self._first_of_attempt = 0
        self._began = time.monotonic()
        self._asked_since = self._began  # moved on by the time that was spent at nodes
        self._assigned_at = self._began
        self._outcome = "closed"  # unless it ends otherwise: a stop string was found, or the client left
        self._error: str | None = None
        self._num_cached_tokens = 0
        self._predicted_ttft_s = 0.0
        self.phases = Phases()

    @property
    def transfer_id(self) -> str:
        return transfer_id(self.generation.request_id, self.attempt)

    @property
    def is_finished(self) -> bool:
        return self._outcome in ("stop", "length")

    def lived_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self._began

    def remaining_s(self) -> float:
        return self._began + self.generation.deadline_s - time.monotonic()

    def waited_too_long_for_scheduler(self) -> bool:
        return time.monotonic() - self._asked_since > SCHEDULER_PATIENCE_S

    async def schedule_request(self, basis: HashBasis | None) -> ScheduleRequest:
        """Without block hashes if nothing is known of how nodes make them."""
        generation = self.generation
        token_ids = generation.prompt_ids + self.output_ids
        return ScheduleRequest(
            request_id=generation.request_id,
            attempt=self.attempt,
            fingerprint=generation.fingerprint,
            num_prompt_tokens=len(token_ids),
            max_new_tokens=generation.sampling.max_tokens - len(self.output_ids),
            num_output_tokens=len(self.output_ids),
            priority=generation.priority,
            age_s=time.monotonic() - self._asked_since,
            avoid=sorted(self.avoid),
            deadline_in_s=max(0.0, self.remaining_s()),
            block_hashes=await self._hashes.of(token_ids, basis) if basis else [],
        )

    def foreseen(self, first_token_in_s: float) -> None:
        """The scheduler has answered; what it says first is what the request was let in for."""
        if not self._predicted_ttft_s and first_token_in_s:
            self._predicted_ttft_s = time.monotonic() - self._began + first_token_in_s

    def assigned(self, assignment: Assignment) -> None:
        record = self.generation.record
        record.num_attempts = self.attempt + 1
        record.prefill_node, record.decode_node = assignment.prefill.node_id, assignment.decode.node_id
        self._assigned_at = time.monotonic()

    def next_attempt(self) -> None:
        """The same request again, going on from the output that it has.

        Patience begins anew only after an attempt that brought output: who gets nothing but assignments waits
        no longer than who gets none.
        """
        now = time.monotonic()
        has_run = len(self.output_ids) > self._first_of_attempt
        self._asked_since = now if has_run else self._asked_since + now - self._assigned_at
        self.attempt += 1
        self._first_of_attempt = len(self.output_ids)

    def suspect(self, assignment: Assignment) -> str:
        """The node that holds the attempt: decode from the second token of the attempt on."""
        has_first = len(self.output_ids) > self._first_of_attempt
        return (assignment.decode if has_first else assignment.prefill).node_id

    def take(self, chunk: TokenChunk) -> Piece:
        """Add a chunk to the output; gives what the client gets of it."""
        is_first = not self.output_ids
        if is_first:
            self.phases.add({"ttft": time.monotonic() - self._began})
        self.output_ids += chunk.token_ids
        # A later attempt finds output of an earlier one cached, too.
        num_cached_tokens = min(chunk.num_cached_tokens, len(self.generation.prompt_ids))
        self._num_cached_tokens = max(self._num_cached_tokens, num_cached_tokens)
        self.phases.add(chunk.phases_s)
        if is_first:
            spent, record = self.phases.seconds, self.generation.record
            record.ttft_s = spent["ttft"]
            record.queue_s = sum(spent.get(phase, 0.0) for phase in WAITS)
        if chunk.finish_reason:
            self._outcome = chunk.finish_reason
        return Piece(
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            finish_reason=chunk.finish_reason,
            num_cached_tokens=self._num_cached_tokens,
        )

    def failed(self, error: FlowKVError) -> None:
        self._outcome = "error"
        self._error = error.message

    def finished(self) -> RequestFinished:
        """The event that closes the journey."""
        total_s = time.monotonic() - self._began
        self.phases.add({"total": total_s})
        if "ttft" in self.phases.seconds:
            self.phases.add({"decode": total_s - self.phases.seconds["ttft"]})
        return RequestFinished(
            request_id=self.generation.request_id,
            attempts=self.attempt + 1,
            outcome=self._outcome,
            num_prompt_tokens=len(self.generation.prompt_ids),
            num_output_tokens=len(self.output_ids),
            num_cached_tokens=self._num_cached_tokens,
            prefill_node=self.generation.record.prefill_node,
            decode_node=self.generation.record.decode_node,
            phases_s=self.phases.seconds,
            error=self._error,
            predicted_ttft_s=round(self._predicted_ttft_s, 3),
        )
