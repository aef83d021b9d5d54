"""A node's load report: a complete snapshot, published every period and at once when it matters."""

from __future__ import annotations

import asyncio
import contextlib

from flowkv_common.errors import FlowKVError
from flowkv_common.node.guest import Node
from flowkv_common.node.steps import Steps
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import LoadReport


def snapshot(node: Node, steps: Steps, seq: int) -> LoadReport:
    """The node's load right now. `seq` grows by one per report of an incarnation."""
    guests = node.guests.values()
    return LoadReport(
        node=node.ref,
        seq=seq,
        period_s=node.settings.load_period_s,
        ready=node.why_not_ready() is None,
        draining=node.draining,
        max_prefill_tokens_per_step=steps.max_prefill_tokens_per_step,
        queued_prefill_tokens=sum(guest.queued_prefill_tokens() for guest in guests),
        num_waiting=sum(guest.num_waiting() for guest in guests),
        num_running=sum(guest.num_running() for guest in guests),
        max_num_seqs=node.settings.max_num_seqs,
        blocks=node.blocks.counts(),
        prefill_tokens_per_s=node.instruments.prefill_tokens_per_s,
        decode_step_s=node.instruments.decode_step_s,
        num_handoffs=node.budget.num_in_flight,
        handoff_bytes=node.budget.bytes_in_flight,
        links=node.links.connectors_in_use(),
        num_prompts=sum(guest.num_prompts() for guest in guests),
        num_prompts_accepted=node.guests["prefill"].num_accepted,
        num_rooms_given=node.num_rooms_given,
        num_sequences_accepted=node.guests["decode"].num_accepted,
        num_context_tokens=sum(guest.num_context_tokens() for guest in guests),
        step=node.instruments.step_fitter.fit(),
        epoch=node.epoch,
        forecast=node.guests["decode"].forecast(),
    )


async def report_load(node: Node, steps: Steps) -> None:
    """Until cancelled. While cut off from NATS nothing is said: an old report is worse than none."""
    seq = 0
    forget_callback = node.bus.on_reconnect(node.changed.set)
    try:
        while True:
            node.changed.clear()
            if node.bus.is_connected:
                seq += 1
                with contextlib.suppress(FlowKVError):  # the next one says it all again
                    await node.bus.publish(subjects.load(node.ref.node_id), snapshot(node, steps, seq))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(node.settings.load_period_s):
                    await node.changed.wait()
    finally:
        forget_callback()
