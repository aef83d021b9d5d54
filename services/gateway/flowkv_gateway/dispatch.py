"""What the HTTP side asks for and what it gets back. Knows neither HTTP nor NATS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from flowkv_common import __version__
from flowkv_common.aio import Phases, running
from flowkv_common.bus.connection import SETTLE_S, Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.errors import (
    BadRequest,
    DeadlineExceeded,
    FlowKVError,
    Full,
    NotFound,
    TooLarge,
    TransferFailed,
    Unavailable,
    from_wire,
)
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Assignment,
    Cancel,
    Keepalive,
    ModelCard,
    PrefillRun,
    RequestFinished,
    Resume,
    Resumed,
    SamplingParams,
    ScheduleRequest,
    StepTokens,
    TokenChunk,
    TokenIds,
    TokenLogprob,
    Wait,
    hashes_that_fit,
    ids_that_fit,
    transfer_id,
)
from flowkv_common.wire.nodes import LoadReport
from flowkv_gateway.cluster import (
    MAX_HASHES,
    AttemptStream,
    Cluster,
    HashBasis,
    OwnModel,
    PromptHashes,
    Readiness,
    Streams,
)
from flowkv_gateway.http import for_client


@dataclass
class Record:
    """What has become of a generation so far. Written by who makes the answer, read by who asked for it.

    `queue_s` of the `ttft_s` seconds to the first token were waits: for a pair of nodes, and at the nodes.
    """

    num_attempts: int = 0
    prefill_node: str = ""  # of the last attempt
    decode_node: str = ""
    ttft_s: float | None = None
    queue_s: float = 0.0


@dataclass(frozen=True)
class Generation:
    """One prompt to continue once. `deadline_s` counts from the call of `generate`."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline_s: float
    priority: int = 0
    fingerprint: str = field(kw_only=True)  # of the model, on all attempts
    record: Record = field(default_factory=Record, compare=False)


class Piece(NamedTuple):
    """The next tokens of an answer, in order and without gaps; `finish_reason` is set in the last piece.

    `logprobs` is empty or has one entry per token.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    num_cached_tokens: int


class Load(NamedTuple):
    """Open requests, by whether a node works at them now, and the share of KV blocks in use.

    The requests are this generator's own: so the sum over gateways counts each once. The blocks are those of
    all nodes of the model.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0 to 1


class Generator(Protocol):
    """Makes answers. The HTTP side knows nothing of nodes, attempts or waiting."""

    def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """The answer in pieces. Raises FlowKVError; closing the iterator cancels the request."""
        ...

    def model(self) -> ModelCard | None:
        """The model of new requests; None until a node that serves the gateway's model has joined."""
        ...

    def load(self) -> Load: ...

    def why_not_ready(self) -> str | None:
        """What is missing for a request sent now to be served; None if nothing is."""
        ...


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


log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
CONTROL_TIMEOUT_S = 2.0
# A scheduler decides within milliseconds. One that hangs stays subscribed, its successor comes within 2.5 s,
# and who has asked the first one must not wait much longer than that.
SCHEDULE_TIMEOUT_S = 1.0
# No token and no keepalive for so long: the attempt is lost. Nodes send keepalives once a second.
SILENCE_S = 3.0
# A message that is out of order by more than this was lost.
GAP_S = 0.1
# Just after NATS was away nodes may not be back yet: attempts must not fail one after the other meanwhile.
UNSETTLED_PAUSE_S = 1.0
# Longer than it takes to notice that it is we who are cut off.
RESUME_TIMEOUT_S = 2.0
# What another attempt can't mend: the request itself is wrong, refused, or out of time.
FINAL = (BadRequest, NotFound, TooLarge, Full, DeadlineExceeded)


class Dispatch:
    """Runs requests on the cluster; the `Generator` behind the HTTP side. Made by `open_dispatch`."""

    def __init__(self, bus: Bus, gateway_id: str, own: OwnModel) -> None:
        self._bus = bus
        self._gateway_id = gateway_id
        self.streams = Streams()
        self.cluster = Cluster(own)
        self.readiness = Readiness(bus, self.cluster)
        self._num_open = 0

    def model(self) -> ModelCard | None:
        """Of new requests; its window is one that our messages can carry."""
        if (card := self.cluster.model()) is None:
            return None
        window = min(card.max_model_len, ids_that_fit(self._bus.max_payload))
        return msgspec.structs.replace(card, max_model_len=window)

    def metadata(self) -> dict[str, str]:
        """What `nats micro info` shows of the gateway: whose nodes serve it."""
        model = self.model()
        return {"model": model.name, "fingerprint": model.fingerprint} if model else {}

    def load(self) -> Load:
        num_running = self.streams.num_running()
        return Load(num_running, self._num_open - num_running, self.cluster.kv_cache_usage())

    def why_not_ready(self) -> str | None:
        return self.readiness.why_not()

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, over as many attempts as it takes. Raises FlowKVError, fit for the client."""
        journey = Journey(generation, hashes_that_fit(self._bus.max_payload))
        self._num_open += 1
        try:
            while True:
                # It asks for as long as it makes sense: what comes of that is final.
                assignment = await self._schedule(journey)
                try:
                    async with contextlib.aclosing(self._attempt(journey, assignment)) as pieces:
                        async for piece in pieces:
                            yield piece
                    return
                except FlowKVError as error:
                    self._consider_retry(journey, error)
                    if self._bus.connected_for_s < min(SETTLE_S, journey.lived_s()):
                        await asyncio.sleep(UNSETTLED_PAUSE_S)  # NATS was away just now
        except FlowKVError as error:
            journey.failed(error)
            if not isinstance(error, Full):
                log.warning("request %s failed: %s: %s", generation.request_id, error.code, error.message)
            raise for_client(error, generation.deadline_s) from error
        finally:
            self._num_open -= 1
            event = subjects.event("request_finished", generation.request_id)
            with contextlib.suppress(FlowKVError):
                await self._bus.publish(event, journey.finished())

    def _consider_retry(self, journey: Journey, error: FlowKVError) -> None:
        """Raises the error when another attempt would not help."""
        if isinstance(error, FINAL) or journey.attempt + 1 >= MAX_ATTEMPTS:
            raise error
        if journey.remaining_s() <= 0:
            raise DeadlineExceeded("the request ran out of time") from error
        log.warning("attempt %s failed, trying again: %s", journey.transfer_id, error.message)
        journey.next_attempt()

    async def _attempt(self, journey: Journey, assignment: Assignment) -> AsyncGenerator[Piece, None]:
        """One attempt on one pair of nodes; cancelled on both, however it ends but by itself."""
        with self.streams.open(journey.transfer_id, len(journey.output_ids)) as stream:
            try:
                await self._start(journey, assignment)
                while not journey.is_finished:
                    chunk = await self._next_chunk(journey, assignment, stream)
                    yield journey.take(chunk)
            finally:
                if not journey.is_finished:
                    await self._cancel(journey.transfer_id, assignment)

    async def _schedule(self, journey: Journey) -> Assignment:
        """Ask until there is a pair: the gateway does the waiting, so no queue is lost with a scheduler."""
        with journey.phases.phase("schedule"):
            while True:
                answer = await self._ask_scheduler(journey)
                journey.foreseen(answer.first_token_in_s)
                if isinstance(answer, Assignment):
                    journey.assigned(answer)
                    return answer
                remaining_s = journey.remaining_s()
                if remaining_s <= 0:
                    raise DeadlineExceeded(f"waited in vain: {answer.reason}")
                await asyncio.sleep(min(answer.retry_in_s, remaining_s))

    async def _ask_scheduler(self, journey: Journey) -> Assignment | Wait:
        basis = self.cluster.hash_basis(journey.generation.fingerprint)
        request = await journey.schedule_request(basis)
        kinds = Assignment | Wait
        try:
            answer = await self._bus.request(subjects.SCHEDULE, request, kinds, timeout_s=SCHEDULE_TIMEOUT_S)
        except (Unavailable, DeadlineExceeded) as error:
            # No scheduler just now, or we are cut off: worth waiting for, a while. Who has begun to answer
            # waits for NATS as others do whose nodes still work.
            may_wait = bool(journey.output_ids) and not self._bus.is_settled
            if self._bus.is_closed or (journey.waited_too_long_for_scheduler() and not may_wait):
                raise Unavailable(error.message, retry_after_s=1.0) from error
            return Wait(retry_in_s=0.2, reason=error.message)
        assert isinstance(answer, Assignment | Wait)
        return answer

    async def _start(self, journey: Journey, assignment: Assignment) -> None:
        run = PrefillRun(
            request_id=journey.generation.request_id,
            attempt=journey.attempt,
            epoch=assignment.epoch,
            node=assignment.prefill,
            fingerprint=journey.generation.fingerprint,
            decode=assignment.decode,
            gateway_id=self._gateway_id,
            prompt_ids=TokenIds.of(journey.generation.prompt_ids),
            output_ids=TokenIds.of(journey.output_ids),
            sampling=journey.generation.sampling,
            deadline_in_s=journey.remaining_s(),
        )
        subject = subjects.at(subjects.PREFILL_RUN, assignment.prefill.node_id)
        try:
            await self._bus.request(subject, run, Accepted, timeout_s=CONTROL_TIMEOUT_S)
        except FlowKVError as error:
            if self._bus.is_connected:  # else it was us
                journey.avoid.add(assignment.prefill.node_id)
            if isinstance(error, DeadlineExceeded):
                # That was the node's time, not the client's: another node may answer.
                raise Unavailable(error.message) from error
            raise

    async def _next_chunk(
        self, journey: Journey, assignment: Assignment, stream: AttemptStream
    ) -> TokenChunk:
        """The next chunk, by resume if a message was lost. Raises FlowKVError when the attempt has failed."""
        while True:
            remaining_s = journey.remaining_s()
            if remaining_s <= 0:
                raise DeadlineExceeded("the request ran out of time")
            patience_s = GAP_S if stream.gap_since else SILENCE_S / 4
            chunk = await stream.next(min(patience_s, remaining_s))
            if chunk is None:
                await self._look_after(journey, assignment, stream)
            elif chunk.error is not None:
                error = from_wire(chunk.error)
                # Prefill says by this code that it was the decode node that failed.
                failed = assignment.decode.node_id if isinstance(error, TransferFailed) else stream.failed_at
                journey.avoid.add(failed or journey.suspect(assignment))
                raise error
            else:
                return chunk

    async def _look_after(self, journey: Journey, assignment: Assignment, stream: AttemptStream) -> None:
        """Nothing came for a while: is a message lost, or the node? Raises Unavailable for the latter."""
        if self._bus.is_closed:
            raise Unavailable("the connection to NATS was closed for good")
        now = time.monotonic()
        silent = now - stream.heard_at > SILENCE_S
        lost = stream.gap_since is not None and now - stream.gap_since > GAP_S
        if not silent and not lost:
            return
        if not self._bus.is_connected or (silent and not lost and not self._bus.is_settled):
            return  # cut off ourselves, or just back: no verdict on others
        try:
            subject = subjects.at(subjects.DECODE_RESUME, assignment.decode.node_id)
            has_more = True
            while has_more:
                resume = Resume(transfer_id=journey.transfer_id, from_index=stream.expected)
                resumed = await self._bus.request(subject, resume, Resumed, timeout_s=RESUME_TIMEOUT_S)
                stream.push(resumed.chunk, assignment.decode.node_id)
                has_more = bool(resumed.chunk.token_ids) and resumed.chunk.finish_reason is None
        except FlowKVError as error:
            if isinstance(error, (Unavailable, DeadlineExceeded)) and not self._bus.is_settled:
                return  # it may be back a moment after us
            suspect = journey.suspect(assignment)
            journey.avoid.add(suspect)
            raise Unavailable(f"{suspect} fell silent: {error.message}") from error

    async def _cancel(self, tid: str, assignment: Assignment) -> None:
        """Tell the pair; other nodes have never heard of the attempt."""
        cancel = Cancel(transfer_id=tid, reason="not wanted any more")
        for node_id in {assignment.prefill.node_id, assignment.decode.node_id}:
            with contextlib.suppress(FlowKVError):
                await self._bus.publish(subjects.at(subjects.NODE_CANCEL, node_id), cancel)


@contextlib.asynccontextmanager
async def open_dispatch(
    nats_url: str, own: OwnModel, on_closed: Callable[[], None] | None = None
) -> AsyncIterator[Dispatch]:
    """A gateway's connection to the cluster, listening for tokens, keepalives, nodes and their load.

    Of the nodes only those that serve its `own` model are its cluster. `on_closed` is called when NATS ends
    the connection for good. Raises Unavailable as `connect`.
    """
    gateway_id = f"gateway-{secrets.token_hex(4)}"
    async with connect(nats_url, name=f"flowkv-gateway/{gateway_id}", on_closed=on_closed) as bus:
        dispatch = Dispatch(bus, gateway_id, own)
        service = Service(
            bus,
            name="gateway",
            version=__version__,
            service_id=gateway_id,
            metadata=dispatch.metadata,
            endpoints=[Endpoint(subjects.keepalive(gateway_id), Keepalive, dispatch.streams.keepalive)],
        )
        async with (
            await bus.subscribe(subjects.tokens(gateway_id), StepTokens, dispatch.streams.take),
            await bus.subscribe(subjects.LOAD_ALL, LoadReport, lambda r, _: dispatch.cluster.hear(r)),
            service,
            running(watch_nodes(bus, dispatch.cluster.follow), dispatch.readiness.keep_asking()),
        ):
            yield dispatch
