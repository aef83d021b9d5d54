"""One request's way through the cluster: schedule, start the attempt, stream its tokens, retry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from flowkv_common import __version__
from flowkv_common.aio import running
from flowkv_common.bus.connection import CONTROL_TIMEOUT_S, SETTLE_S, Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.cluster_view import ClusterView, hearing_events
from flowkv_common.config import NatsSettings
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
from flowkv_common.tracing import Attributes, open_tracing
from flowkv_common.wire import subjects
from flowkv_common.wire.limits import hashes_that_fit, ids_that_fit
from flowkv_common.wire.messages import (
    Accepted,
    Assignment,
    Cancel,
    FindFinished,
    FinishedRequests,
    Keepalive,
    KeepaliveReply,
    ModelCard,
    NodeRef,
    PrefillRun,
    Resume,
    Resumed,
    ScheduleRequest,
    StepTokens,
    TokenChunk,
    TokenIds,
    Wait,
)
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_gateway.cluster import Cluster, ModelNodes
from flowkv_gateway.errors import for_client
from flowkv_gateway.finished import FinishedLog
from flowkv_gateway.readiness import READY_PERIOD_S, Readiness
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.token_stream import TokenStream
from flowkv_gateway.traces import add_attempt
from flowkv_gateway.turns import Turn
from flowkv_gateway.witness import Witness

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# Of a host that has died several nodes may be chosen one after the other, until their reports are missed
# (1.5 s): the last attempt is no longer one of those.
LAST_ATTEMPT_PAUSE_S = 2.0
# Of a request, from doubted nodes, beside those attempts. It never goes back to one that it has left. If its
# third pair is slow too, so are most.
MAX_MOVES = 2
# Meanwhile no token of the request is passed on, and a scheduler decides within milliseconds.
MOVE_TIMEOUT_S = 0.25
# Another attempt would not help: the request itself is wrong, refused, or out of time.
FINAL = (BadRequest, NotFound, TooLarge, Full, DeadlineExceeded)
# A scheduler decides within milliseconds. One that hangs stays subscribed and its successor comes within
# 2.5 s: a request that asked the first one must not wait much longer.
SCHEDULE_TIMEOUT_S = 1.0
# Of three NATS servers the one that leads the scheduler's bucket may die. The others choose another one of
# them in 4 to 9 s, and meanwhile no scheduler can show that it leads. One that was cut off with all nodes
# notices it as late.
SCHEDULER_PATIENCE_S = 20.0
# No token and no keepalive for so long: the attempt is lost. Nodes send keepalives once a second.
SILENCE_S = 3.0
# A message that is out of order by more than this was lost.
GAP_S = 0.1
# Longer than this gateway takes to notice that it is cut off itself.
RESUME_TIMEOUT_S = 2.0
# Just after NATS was away, nodes may not be back yet: attempts must not fail one after the other.
UNSETTLED_PAUSE_S = 1.0
# A node that stalls must lose work within two seconds, and the scheduler looks twice a second.
SEEN_PERIOD_S = 0.25


class _Moves(Exception):
    """Another pair ends the request sooner than the one that works at it."""

    def __init__(self, elsewhere: Assignment) -> None:
        self.elsewhere = elsewhere


class Load(NamedTuple):
    """Open requests for a model, by whether a node works at them now, and its nodes' KV blocks in use.

    The sum of requests over gateways counts each once. The blocks are those of all nodes of the model.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0 to 1

    def plus(self, other: Load) -> Load:
        """Of two models of one name, while one is exchanged for the other."""
        return Load(
            self.num_running + other.num_running,
            self.num_waiting + other.num_waiting,
            max(self.kv_cache_usage, other.kv_cache_usage),
        )


class Dispatch:
    """Runs requests on the cluster. Made by `open_dispatch`."""

    def __init__(self, bus: Bus, gateway_id: str, models: Iterable[ModelNodes]) -> None:
        self._bus = bus
        self._gateway_id = gateway_id
        self.tracing = bus.tracing
        self.url = ""  # of the API, once it is served
        self.cluster = Cluster(models)
        self.readiness = Readiness(bus, self.cluster)
        self.streams: dict[str, TokenStream] = {}  # transfer id -> the tokens of this attempt
        self.witness = Witness(gateway_id)
        self.finished = FinishedLog(gateway_id)
        self._nodes = ClusterView()  # and their reports, of all models
        self._views: list[ClusterView] = [self._nodes]  # with those of whoever looks at the cluster now
        self._descriptors: Mapping[str, NodeDescriptor] = {}
        self._open: dict[str, RequestState] = {}  # by request id

    def card_of(self, nodes: ModelNodes, num_further_bytes: int = 0) -> ModelCard | None:
        """The model of new requests to these nodes; None until one of them has joined.

        Its window is one that our messages can carry, with so many bytes beside the tokens.
        """
        if (card := nodes.model) is None:
            return None
        window = min(card.max_model_len, ids_that_fit(self._bus.max_payload - num_further_bytes))
        return msgspec.structs.replace(card, max_model_len=window)

    def metadata(self) -> dict[str, str]:
        """What `nats micro info` shows of the gateway: where it listens, and which models it serves."""
        cards = [nodes.model for nodes in self.cluster.models if nodes.model]
        if not cards:
            return {"url": self.url}
        names, fingerprints = (card.name for card in cards), (card.fingerprint for card in cards)
        return {"url": self.url, "model": ", ".join(names), "fingerprint": ", ".join(fingerprints)}

    def load(self, nodes: ModelNodes) -> Load:
        mine = [one for one in self._open.values() if self.cluster.of(one.fingerprint) is nodes]
        streams = (self.streams.get(request.transfer_id) for request in mine)
        num_running = sum(stream is not None and stream.is_running for stream in streams)
        return Load(num_running, len(mine) - num_running, nodes.kv_cache_usage())

    def live_pairs(self) -> list[tuple[NodeDescriptor, NodeDescriptor]]:
        """Ready nodes, of any model, that could serve a request together: the one for prefill first."""
        nodes = {node.node_id: node.descriptor for node in self._nodes.nodes()}
        return [(nodes[prefill], nodes[decode]) for prefill, decode in self._nodes.pairs()]

    @contextlib.asynccontextmanager
    async def view_cluster(self) -> AsyncIterator[ClusterView]:
        """All that this gateway may hear of the cluster while the context lasts, nothing of it twice."""
        view = ClusterView()
        view.on_nodes(self._descriptors)
        self._views.append(view)
        try:
            async with hearing_events(self._bus, view):
                yield view
        finally:
            self._views.remove(view)

    async def generate(self, request: RequestState) -> AsyncGenerator[TokenChunk, None]:
        """The answer in chunks, in order and without gaps, over as many attempts as it takes.

        The last chunk has a finish reason; none has an error: those are raised as FlowKVError, fit for the
        client. Closing the generator cancels the request.
        """
        request.begin()
        self._open[request.request_id] = request
        try:
            with self._turn(request) as turn:
                elsewhere: Assignment | None = None
                while True:
                    # Waits for as long as it makes sense: its errors are final.
                    assignment = elsewhere or await self._schedule(request, turn)
                    elsewhere = None
                    request.take(assignment)
                    try:
                        async with self._attempt(request, assignment) as stream:
                            while not request.is_finished:
                                chunk = await self._next_chunk(request, stream)
                                if chunk.prompt_logprobs:
                                    request.add_prompt_logprobs(chunk)
                                    continue
                                request.add_chunk(chunk)
                                if turn is not None:  # with output it comes before all others
                                    turn.turns.end(turn)
                                    turn = None
                                yield chunk
                        return
                    except _Moves as move:
                        elsewhere = move.elsewhere
                        log.info("%s leaves %s: %s", request.transfer_id, request.holder(), elsewhere.reason)
                        request.num_moves += 1
                        request.begin_next_attempt(f"goes on elsewhere: {elsewhere.reason}")
                    except FlowKVError as error:
                        num_failed = request.attempt + 1 - request.num_moves
                        if isinstance(error, FINAL) or num_failed >= MAX_ATTEMPTS:
                            raise
                        if request.remaining_s() <= 0:
                            raise DeadlineExceeded("the request ran out of time") from error
                        log.warning("attempt %s failed, trying again: %s", request.transfer_id, error.message)
                        request.begin_next_attempt(error.message)
                        if num_failed == MAX_ATTEMPTS - 1:
                            await asyncio.sleep(min(LAST_ATTEMPT_PAUSE_S, request.remaining_s()))
                        if self._bus.connected_for_s < min(SETTLE_S, request.lived_s()):
                            await asyncio.sleep(UNSETTLED_PAUSE_S)  # NATS was away just now
        except FlowKVError as error:
            request.outcome, request.error = "error", error.message
            if not isinstance(error, Full):
                log.warning("request %s failed: %s: %s", request.request_id, error.code, error.message)
            raise for_client(error, request.deadline_s) from error
        finally:
            self._open.pop(request.request_id, None)
            event = request.finished_event()
            self.finished.add(event)
            with contextlib.suppress(FlowKVError):
                await self._bus.publish(subjects.event("request_finished", request.request_id), event)

    async def run_on(self, request: RequestState, prefill: NodeRef, decode: NodeRef) -> None:
        """The request, to its end, in one attempt on these nodes, whatever a scheduler thinks of them.

        Raises FlowKVError as they have failed it.
        """
        assignment = Assignment(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=0,
            prefill=prefill,
            decode=decode,
            reason="this pair is tried",
            prefill_candidates=[],
            decode_candidates=[],
        )
        request.begin()
        request.take(assignment)
        request.num_moves = MAX_MOVES  # it stays, though they are doubted
        self._open[request.request_id] = request
        try:
            async with self._attempt(request, assignment) as stream:
                while not request.is_finished:
                    request.add_chunk(await self._next_chunk(request, stream))
        finally:
            self._open.pop(request.request_id, None)

    async def _schedule(self, request: RequestState, turn: Turn | None) -> Assignment:
        """Ask until there is a pair: the gateway does the waiting, so no queue is lost with a scheduler."""
        about: Attributes = {"flowkv.request_id": request.request_id, "flowkv.attempt": request.attempt}
        with (
            request.phases.phase("schedule"),
            self.tracing.begin("schedule", about, kind="client") as span,
            span.current(),
        ):
            while True:
                if turn is not None:
                    waited_since = time.monotonic()
                    try:
                        async with asyncio.timeout(request.remaining_s()):
                            await turn.turns.wait(turn)
                    except TimeoutError:
                        raise DeadlineExceeded("waited in vain for the turn of its key") from None
                    request.clock.turn(now := time.monotonic())
                    span.add_part("turn", waited_since, now - waited_since)
                question = await self._question(request)
                try:
                    answer = await self._bus.request(
                        subjects.SCHEDULE, question, Assignment | Wait, timeout_s=SCHEDULE_TIMEOUT_S
                    )
                except (Unavailable, DeadlineExceeded) as error:
                    # No scheduler just now, or we are cut off: worth waiting for, a while. A request with
                    # output waits for NATS as long as those do whose nodes still work.
                    is_out_of_patience = time.monotonic() - request.asked_since > SCHEDULER_PATIENCE_S
                    may_wait = bool(request.output_ids) and not self._bus.is_settled
                    if self._bus.is_closed or (is_out_of_patience and not may_wait):
                        raise Unavailable(error.message, retry_after_s=1.0) from error
                    answer = Wait(retry_in_s=0.2, reason=error.message)
                assert isinstance(answer, Assignment | Wait)
                if answer.first_token_in_s and not request.predicted_ttft_s:
                    request.predicted_ttft_s = request.lived_s() + answer.first_token_in_s
                if isinstance(answer, Assignment):
                    if turn is not None:
                        turn.turns.assign(turn)
                    span.describe({"flowkv.reason": answer.reason})
                    return answer
                span.add_event("wait", attributes={"flowkv.reason": answer.reason})
                request.clock.answer(answer, time.monotonic())
                remaining_s = request.remaining_s()
                if remaining_s <= 0:
                    raise DeadlineExceeded(f"waited in vain: {answer.reason}")
                await asyncio.sleep(min(answer.retry_in_s, remaining_s))

    async def _question(self, request: RequestState) -> ScheduleRequest:
        nodes = self.cluster.of(request.fingerprint)
        block_size = nodes.block_size(request.fingerprint) if nodes else None
        hashes = await request.hash_blocks(block_size, hashes_that_fit(self._bus.max_payload))
        return request.schedule_request(hashes)

    async def _find_elsewhere(self, request: RequestState, stream: TokenStream) -> Assignment | None:
        """A pair that would end the request sooner than a doubted node, if the scheduler knows one now.

        Nothing waits for the answer but the request's next token.
        """
        nodes = {request.decode_node} if request.has_run else {request.prefill_node, request.decode_node}
        doubted, now = nodes & self.readiness.doubted, time.monotonic()
        if not doubted or now < stream.may_move_at or request.num_moves == MAX_MOVES:
            return None
        stream.may_move_at = now + READY_PERIOD_S
        question = msgspec.structs.replace(
            await self._question(request),
            attempt=request.attempt + 1,
            age_s=request.age_of_next_attempt(),
            avoid=sorted(request.avoid | doubted),
            runs_on=request.decode_node,
            overdue_s=max(0.0, now - stream.due_at),
            gap_s=self.witness.last_gap_s(request.transfer_id),
        )
        try:
            answer = await self._bus.request(
                subjects.SCHEDULE, question, Assignment | Wait, timeout_s=MOVE_TIMEOUT_S
            )
        except FlowKVError:
            return None
        if not isinstance(answer, Assignment) or not stream.due.empty():
            return None  # what has come meanwhile may be the end
        request.avoid |= doubted
        return answer

    def _turn(self, request: RequestState) -> contextlib.AbstractContextManager[Turn | None]:
        """None for a request that is in no other's way."""
        nodes = self.cluster.of(request.fingerprint)
        if nodes is None or request.tenant is None or request.goals.is_batch:
            return contextlib.nullcontext()
        return nodes.turns.turn(request.tenant, len(request.prompt_ids))

    @contextlib.asynccontextmanager
    async def _attempt(self, request: RequestState, assignment: Assignment) -> AsyncIterator[TokenStream]:
        """One attempt on one pair of nodes; cancelled on both, however it ends but by itself."""
        stream = TokenStream(len(request.output_ids), assignment.first_token_in_s, request.clock)
        self.streams[request.transfer_id] = stream
        goes_on, why_ended = False, ""
        self.witness.begin(request.transfer_id, assignment, time.monotonic())
        about: Attributes = {
            "flowkv.transfer_id": request.transfer_id,
            "flowkv.prefill_node": request.prefill_node,
            "flowkv.decode_node": request.decode_node,
            "flowkv.reason": assignment.reason,
        }
        span = self.tracing.begin("attempt", about, kind="client", began=request.assigned_at)
        try:
            with span.current():
                await self._start_prefill(request, assignment)
            yield stream
        except _Moves as move:
            goes_on, why_ended = True, f"goes on elsewhere: {move.elsewhere.reason}"
            raise
        except FlowKVError as error:
            why_ended = error.message
            span.fail(error)
            raise
        finally:
            if span.is_recorded:
                add_attempt(span, request.clock.times(time.monotonic(), why_ended), request.began)
            span.end()
            del self.streams[request.transfer_id]
            self.witness.end(request.transfer_id, time.monotonic(), goes_on=goes_on)
            if not request.is_finished:
                reason = "it goes on elsewhere" if goes_on else "not wanted any more"
                cancel = Cancel(transfer_id=request.transfer_id, reason=reason, goes_on=goes_on)
                # Other nodes have never heard of the attempt.
                for node_id in {request.prefill_node, request.decode_node}:
                    with contextlib.suppress(FlowKVError):
                        await self._bus.publish(subjects.at(subjects.NODE_CANCEL, node_id), cancel)

    async def _start_prefill(self, request: RequestState, assignment: Assignment) -> None:
        run = PrefillRun(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=assignment.epoch,
            node=assignment.prefill,
            fingerprint=request.fingerprint,
            decode=assignment.decode,
            gateway_id=self._gateway_id,
            prompt_ids=TokenIds.of(request.prompt_ids),
            output_ids=TokenIds.of(request.output_ids),
            sampling=request.sampling_of_attempt(),
            deadline_in_s=request.remaining_s(),
            due_in_s=assignment.due_in_s,
            interruptible_for_s=assignment.interruptible_for_s,
        )
        subject = subjects.at(subjects.PREFILL_RUN, request.prefill_node)
        try:
            await self._bus.request(subject, run, Accepted, timeout_s=CONTROL_TIMEOUT_S)
        except FlowKVError as error:
            if self._bus.is_connected:  # else it was us
                request.avoid.add(request.prefill_node)
            if isinstance(error, DeadlineExceeded):
                # That was the node's time, not the client's: another node may answer.
                raise Unavailable(error.message) from error
            raise

    async def _next_chunk(self, request: RequestState, stream: TokenStream) -> TokenChunk:
        """The next chunk, by resume if a message was lost.

        Raises FlowKVError when the attempt has failed, _Moves when another pair is better.
        """
        while True:
            if stream.due.empty() and (elsewhere := await self._find_elsewhere(request, stream)):
                raise _Moves(elsewhere)
            remaining_s = request.remaining_s()
            if remaining_s <= 0:
                raise DeadlineExceeded("the request ran out of time")
            patience_s = GAP_S if stream.gap_since else SILENCE_S / 4
            try:
                async with asyncio.timeout(min(patience_s, remaining_s)):
                    chunk = await stream.due.get()
            except TimeoutError:
                await self._check_silence(request, stream)
                continue
            if chunk.error is None:
                return chunk
            error = from_wire(chunk.error)
            # Prefill says by this code that it was the decode node that failed.
            failed = stream.failed_at
            if isinstance(error, TransferFailed):
                failed = request.decode_node
                self.witness.excuse_prefill(request.transfer_id)
            request.avoid.add(failed or request.holder())
            raise error

    async def _check_silence(self, request: RequestState, stream: TokenStream) -> None:
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
            subject = subjects.at(subjects.DECODE_RESUME, request.decode_node)
            has_more = True
            while has_more:
                resume = Resume(transfer_id=request.transfer_id, from_index=stream.expected)
                resumed = await self._bus.request(subject, resume, Resumed, timeout_s=RESUME_TIMEOUT_S)
                stream.add_chunk(resumed.chunk, request.decode_node)
                has_more = bool(resumed.chunk.token_ids) and resumed.chunk.finish_reason is None
        except FlowKVError as error:
            if isinstance(error, (Unavailable, DeadlineExceeded)) and not self._bus.is_settled:
                return  # it may be back a moment after us
            if stream.heard_at > now and not lost:
                return  # it was cut off, and is back: what was lost meanwhile shows as a gap
            suspect = request.holder()
            request.avoid.add(suspect)
            raise Unavailable(f"{suspect} fell silent: {error.message}") from error

    # --- what `open_dispatch` runs -----------------------------------------------------------------

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self._descriptors = dict(descriptors)
        self.cluster.on_nodes(descriptors)
        for view in self._views:
            view.on_nodes(descriptors)

    def on_report(self, report: LoadReport) -> None:
        self.cluster.on_report(report)
        for view in self._views:
            view.on_report(report)

    def on_tokens(self, step: StepTokens) -> None:
        now = time.monotonic()
        for chunk in step.chunks:
            self.witness.add_tokens(chunk.transfer_id, step.node_id, len(chunk.token_ids), now)
            if stream := self.streams.get(chunk.transfer_id):
                stream.add_chunk(chunk, step.node_id)

    async def on_keepalive(self, message: Keepalive) -> KeepaliveReply:
        for attempt, state in message.states.items():
            stream = self.streams.get(attempt)
            # A decode node that has only reserved blocks is no sign of life: prefill must show one.
            if stream is not None and state != "reserved":
                stream.heard_at = time.monotonic()
                stream.is_running = state not in ("queued", "preempted")
                if state == "preempted":
                    self.witness.pause(attempt)
        return KeepaliveReply(unknown=[attempt for attempt in message.states if attempt not in self.streams])

    async def find_finished(self, wanted: FindFinished) -> FinishedRequests:
        return self.finished.find(wanted, self._bus.max_payload)

    async def keep_telling(self) -> None:
        """What we see of nodes, until cancelled. While cut off from NATS nothing is said."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(SEEN_PERIOD_S)
            now = time.monotonic()
            if not self._bus.is_connected or now - began > 2 * SEEN_PERIOD_S:  # it was us
                self.witness.forget_open()
            for seen in self.witness.tell(now):
                with contextlib.suppress(FlowKVError):
                    await self._bus.publish(subjects.seen(self._gateway_id), seen)


@contextlib.asynccontextmanager
async def open_dispatch(
    nats_settings: NatsSettings | str,
    models: Iterable[ModelNodes],
    on_closed: Callable[[], None] | None = None,
) -> AsyncIterator[Dispatch]:
    """A gateway's connection to the cluster, listening for tokens, keepalives, nodes and their load.

    Requests go to the nodes of its `models`, to no others. `on_closed` and what is raised are as of
    `connect`.
    """
    gateway_id = f"gateway-{secrets.token_hex(4)}"
    name = f"flowkv-gateway/{gateway_id}"
    async with (
        open_tracing("flowkv-gateway", gateway_id) as tracing,
        connect(nats_settings, name=name, user="gateway", on_closed=on_closed, tracing=tracing) as bus,
    ):
        dispatch = Dispatch(bus, gateway_id, models)
        bus.on_reconnect(dispatch.cluster.touch_all)
        service = Service(
            bus,
            name="gateway",
            version=__version__,
            service_id=gateway_id,
            metadata=dispatch.metadata,
            endpoints=[
                Endpoint(subjects.keepalive(gateway_id), Keepalive, dispatch.on_keepalive),
                Endpoint(subjects.FINISHED, FindFinished, dispatch.find_finished),
            ],
        )
        async with (
            await bus.subscribe(subjects.tokens(gateway_id), StepTokens, dispatch.on_tokens),
            await bus.subscribe(subjects.LOAD_ALL, LoadReport, dispatch.on_report),
            service,
            running(
                watch_nodes(bus, dispatch.on_nodes),
                dispatch.readiness.keep_asking_scheduler(),
                dispatch.keep_telling(),
            ),
        ):
            yield dispatch
