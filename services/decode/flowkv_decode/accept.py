"""How requests come in: room is reserved, KV lands, the handoff makes a running sequence of it."""

from __future__ import annotations

import time

from flowkv_common.errors import BadRequest, Full, Stale
from flowkv_common.wire.messages import DecodeRun, Release, Reserve, Reserved, transfer_id
from flowkv_engine.engine.sequence import Sequence
from flowkv_engine.kv.blocks import GROWTH_ROOM, OutOfBlocks
from flowkv_engine.kv.reservations import Reservation
from flowkv_engine.kv.segments import runs_of
from flowkv_node.attempts import Attempt
from flowkv_node.node import Node

# What a prefill node is told to wait before it asks a full node again.
RETRY_S = 0.05


def reserve(node: Node, request: Reserve, num_blocks_owed: int) -> Reserved:
    """Room for a handoff, with what is cached of the prefix pinned; with its token it is renewed.

    Raises Full while there is no room, BadRequest when there never will be, Stale for an attempt that has
    ended or is here already, for a reservation that has ended and for a former life, WrongModel, Unavailable
    when draining; what is reserved already may still be renewed then.
    """
    node.refuse_other_life(request.node)
    node.refuse_other_model(request.fingerprint)
    node.attempts.refuse_ended(request.transfer_id)
    if request.token:
        return _answer(node.reservations.extend(request.transfer_id, request.token, request.expires_in_s))
    if request.transfer_id in node.attempts:
        raise Stale(f"attempt {request.transfer_id} is here already")
    node.refuse_new_work(request.node, request.fingerprint)
    reservation = _open(node, request, num_blocks_owed)
    stop = Attempt(
        request.transfer_id,
        request.gateway_id,
        "reserved",
        lambda _: node.reservations.cancel(request.transfer_id),
    )
    node.attempts.begin(stop)
    node.num_rooms_given += not request.again
    return _answer(reservation)


def _open(node: Node, request: Reserve, num_blocks_owed: int) -> Reservation:
    block_size = node.settings.block_size
    num_blocks = -(-request.num_tokens // block_size)
    if num_blocks > node.blocks.num_blocks:
        raise BadRequest(f"{request.num_tokens} tokens never fit into {node.blocks.num_blocks} blocks")
    if node.reservations.num_open >= node.settings.max_handoffs:
        raise Full("too many handoffs in flight", retry_after_s=RETRY_S)
    # The watermark: or a handoff would preempt those who run, and starve those it has preempted.
    if not node.blocks.can_allocate(num_blocks + num_blocks_owed):
        raise Full(f"no room for {num_blocks} blocks", retry_after_s=RETRY_S)
    try:
        return node.reservations.reserve(
            request.transfer_id,
            num_blocks,
            # The block of the last prompt token is always sent: prefill recomputes that token anyway.
            request.block_hashes[: (request.num_tokens - 2) // block_size],
            like=request.run_lengths,
            expires_in_s=request.expires_in_s,
            room=GROWTH_ROOM,
        )
    except OutOfBlocks:
        raise Full(f"no room for {num_blocks} blocks", retry_after_s=RETRY_S) from None


def _answer(reservation: Reservation) -> Reserved:
    return Reserved(
        transfer_id=reservation.transfer_id,
        token=reservation.token,
        runs=runs_of(reservation.block_ids),
        num_cached_blocks=reservation.num_cached_blocks,
    )


def release(node: Node, message: Release) -> None:
    """Prefill does not want the room, or not now: it comes back. Raises Stale for a wrong token."""
    reservation = node.reservations.claim(message.transfer_id, message.token)
    node.blocks.release(reservation.block_ids)
    node.attempts.end(message.transfer_id)
    # Who waits here for room comes before the next reservation.
    node.retire.notice_room()
    node.wake.set()


def claim(node: Node, run: DecodeRun) -> Sequence:
    """The commit of a handoff: a sequence whose KV stands, all but the last token's.

    Raises Stale when the reservation has expired or the token is wrong, BadRequest for other tokens than it
    was made for; then its blocks are free again.
    """
    tid = transfer_id(run.request_id, run.attempt)
    node.attempts.refuse_ended(tid)
    reservation = node.reservations.claim(tid, run.token)
    num_tokens = len(run.prompt_ids) + len(run.output_ids)
    if not run.output_ids or num_tokens > len(reservation.block_ids) * node.settings.block_size:
        node.blocks.release(reservation.block_ids)
        node.attempts.end(tid)
        node.retire.notice_room()
        raise BadRequest(
            f"{len(run.prompt_ids)} tokens of prompt and {len(run.output_ids)} of output are not what "
            f"{len(reservation.block_ids)} blocks were reserved for"
        )
    sequence = Sequence(
        request_id=run.request_id,
        attempt=run.attempt,
        transfer_id=tid,
        gateway_id=run.gateway_id,
        prompt_ids=run.prompt_ids.unpack(),
        output_ids=run.output_ids.unpack(),
        sampling=run.sampling,
        deadline=time.monotonic() + run.deadline_in_s,
        block_table=list(reservation.block_ids),
        num_committed_blocks=reservation.num_cached_blocks,
    )
    sequence.num_computed_tokens = sequence.num_tokens - 1
    node.commit_computed(sequence)
    return sequence
