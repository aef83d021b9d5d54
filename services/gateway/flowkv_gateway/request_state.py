"""One request: what is asked, and how far its answer has come over all attempts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from flowkv_common.aio import Phases
from flowkv_common.errors import Unavailable
from flowkv_common.fingerprint import block_hashes
from flowkv_common.wire.messages import (
    Assignment,
    AttemptTimes,
    RequestFinished,
    SamplingParams,
    ScheduleRequest,
    TokenChunk,
    TokenLogprob,
    transfer_id,
)
from flowkv_gateway.attempt_clock import AttemptClock
from flowkv_gateway.tenants import Tenant

# The phases before a first token in which nothing of the request is computed.
WAITS = ("schedule", "queue", "reserve")
MAX_HASHES = 16_384  # of a longer prompt the beginning will do
MAX_HASHES_IN_LOOP = 1000  # a few milliseconds: the event loop must not stand still for more


class ServiceGoals(NamedTuple):
    """What a client wants of the service, beside the answer. Seconds; 0: the cluster's."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    is_batch: bool = False


NO_GOALS = ServiceGoals()


@dataclass
class RequestState:
    """One prompt to continue once, and how far its answer has come, over all attempts.

    The HTTP side makes it and reads it. `Dispatch.generate` moves it on.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline_s: float  # from the call of `generate` on
    fingerprint: str  # of the model, on all attempts
    model_name: str = ""  # as clients call it
    priority: int = 0
    tenant: Tenant | None = None
    goals: ServiceGoals = NO_GOALS

    attempt: int = 0
    num_attempts: int = 0  # that were given nodes
    num_moves: int = 0  # of the attempts, those that began elsewhere though the one before still ran
    prefill_node: str = ""  # of the last attempt
    decode_node: str = ""
    output_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # in order, from the second token on
    queue_s: float = 0.0  # of `ttft_s`: waits for a pair of nodes, and at the nodes
    outcome: str = "closed"  # unless it ends otherwise: a stop string was found, or the client left
    error: str | None = None
    avoid: set[str] = field(default_factory=set)  # nodes that failed this request
    phases: Phases = field(default_factory=Phases, compare=False)
    predicted_ttft_s: float = 0.0  # by the scheduler's first answer: what the request was let in for

    began: float = field(default=0.0, compare=False)  # monotonic, as the next two
    asked_since: float = field(default=0.0, compare=False)  # `began`, later by the time spent at nodes
    assigned_at: float = 0.0
    first_of_attempt: int = 0  # index of the attempt's first token
    hashes: list[str] = field(default_factory=list)  # of the first full blocks
    hashed_block_size: int | None = None
    clock: AttemptClock = field(init=False, compare=False)  # of the attempt that runs
    attempt_times: list[AttemptTimes] = field(default_factory=list)  # of those before it

    def __post_init__(self) -> None:
        self.begin()

    @property
    def transfer_id(self) -> str:
        return transfer_id(self.request_id, self.attempt)

    @property
    def ttft_s(self) -> float | None:
        return self.phases.seconds.get("ttft")

    @property
    def is_finished(self) -> bool:
        return self.outcome in ("stop", "length")

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """They are asked for, and have not all come."""
        is_asked = self.sampling.num_prompt_logprobs is not None
        return is_asked and len(self.prompt_logprobs) < len(self.prompt_ids) - 1

    def begin(self) -> None:
        self.began = self.asked_since = time.monotonic()
        self.clock = AttemptClock(self.began, self.began)

    def lived_s(self) -> float:
        return time.monotonic() - self.began

    def remaining_s(self) -> float:
        return self.began + self.deadline_s - time.monotonic()

    async def hash_blocks(self, block_size: int | None, max_hashes: int) -> list[str]:
        """Hashes of the first full blocks, prompt and output together; none if no node's block size is known,
        or if cached blocks are of no use, since log probabilities of the prompt are wanted.

        Tokens are only added, so no block is hashed twice. Many are hashed beside the event loop.
        """
        if block_size is None or self.lacks_prompt_logprobs:
            return []
        if block_size != self.hashed_block_size:
            self.hashed_block_size, self.hashes = block_size, []
        token_ids = self.prompt_ids + self.output_ids
        num_blocks = min(len(token_ids) // block_size, max_hashes, MAX_HASHES)
        num_new = num_blocks - len(self.hashes)
        if num_new > 0:
            wanted = self.fingerprint, token_ids[: num_blocks * block_size], block_size, self.hashes
            if num_new <= MAX_HASHES_IN_LOOP:
                self.hashes = block_hashes(*wanted)
            else:
                self.hashes = await asyncio.to_thread(block_hashes, *wanted)
        return self.hashes

    @property
    def has_run(self) -> bool:
        """The attempt has brought output: decode has it, or will in a moment."""
        return len(self.output_ids) > self.first_of_attempt

    def schedule_request(self, hashes: list[str]) -> ScheduleRequest:
        return ScheduleRequest(
            request_id=self.request_id,
            attempt=self.attempt,
            fingerprint=self.fingerprint,
            num_prompt_tokens=len(self.prompt_ids) + len(self.output_ids),
            max_new_tokens=self.sampling.max_tokens - len(self.output_ids),
            num_output_tokens=len(self.output_ids),
            priority=self.priority,
            age_s=time.monotonic() - self.asked_since,
            avoid=sorted(self.avoid),
            deadline_in_s=max(0.0, self.remaining_s()),
            block_hashes=hashes,
            ttft_goal_s=self.goals.ttft_s,
            itl_goal_s=self.goals.itl_s,
            is_batch=self.goals.is_batch,
        )

    def take(self, assignment: Assignment) -> None:
        """The attempt has its pair."""
        self.num_attempts = self.attempt + 1
        self.prefill_node = assignment.prefill.node_id
        self.decode_node = assignment.decode.node_id
        self.assigned_at = time.monotonic()
        self.clock.answer(assignment, self.assigned_at)

    def age_of_next_attempt(self) -> float:
        """Seconds of asking.

        Patience begins anew only after an attempt that brought output: a request that gets nothing but
        assignments waits no longer than one that gets none.
        """
        return 0.0 if self.has_run else self.assigned_at - self.asked_since

    def begin_next_attempt(self, why: str) -> None:
        """The same request again, going on from the output that it has. `why` the one before has ended."""
        now = time.monotonic()
        self.attempt_times.append(self.clock.times(now, why))
        self.clock = AttemptClock(self.began, now)
        self.asked_since = time.monotonic() - self.age_of_next_attempt()
        self.attempt += 1
        self.first_of_attempt = len(self.output_ids)
        if self.lacks_prompt_logprobs:
            self.prompt_logprobs = []

    def sampling_of_attempt(self) -> SamplingParams:
        """What has come of the prompt is not computed again."""
        if self.sampling.num_prompt_logprobs is None or self.lacks_prompt_logprobs:
            return self.sampling
        return msgspec.structs.replace(self.sampling, num_prompt_logprobs=None)

    def holder(self) -> str:
        """The node that has the attempt: decode from the second token of the attempt on."""
        return self.decode_node if self.has_run else self.prefill_node

    def add_prompt_logprobs(self, chunk: TokenChunk) -> None:
        """The next ones of the prompt; those that follow on a lost message are dropped."""
        if chunk.prompt_index == len(self.prompt_logprobs) + 1:
            self.prompt_logprobs += chunk.prompt_logprobs

    def add_chunk(self, chunk: TokenChunk) -> None:
        """Output. Raises Unavailable if something is missing of what comes before it."""
        is_first = not self.output_ids
        if is_first:
            if self.lacks_prompt_logprobs:
                raise Unavailable("a message with log probabilities of the prompt was lost")
            self.phases.add_seconds({"ttft": self.lived_s()})
        self.output_ids += chunk.token_ids
        if self.tenant is not None:
            self.tenant.add_tokens(len(chunk.token_ids))
        # A later attempt finds output of an earlier one cached, too.
        num_cached_tokens = min(chunk.num_cached_tokens, len(self.prompt_ids))
        self.num_cached_tokens = max(self.num_cached_tokens, num_cached_tokens)
        if chunk.phases_s:
            self.phases.add_seconds(chunk.phases_s)
        if is_first:
            self.queue_s = sum(self.phases.seconds.get(phase, 0.0) for phase in WAITS)
        if chunk.finish_reason:
            self.outcome = chunk.finish_reason

    def finished_event(self) -> RequestFinished:
        now = time.monotonic()
        total_s = now - self.began
        self.phases.add_seconds({"total": total_s})
        if self.ttft_s is not None:
            self.phases.add_seconds({"decode": total_s - self.ttft_s})
        return RequestFinished(
            request_id=self.request_id,
            attempts=self.attempt + 1,
            outcome=self.outcome,
            num_prompt_tokens=len(self.prompt_ids),
            num_output_tokens=len(self.output_ids),
            num_cached_tokens=self.num_cached_tokens,
            prefill_node=self.prefill_node,
            decode_node=self.decode_node,
            phases_s=self.phases.seconds,
            error=self.error,
            predicted_ttft_s=round(self.predicted_ttft_s, 3),
            began_at=round(time.time() - total_s, 3),
            attempt_times=[*self.attempt_times, self.clock.times(now, self._why_ended())],
        )

    def _why_ended(self) -> str:
        """Why the last attempt has ended, if not with the answer's end."""
        if self.is_finished:
            return ""
        return self.error or "closed: a stop string was found, or the client has left"
