"""A prompt on its prefill node: its sequence, its task, and the news that the task waits for."""

from __future__ import annotations

import asyncio
import time

from flowkv_common.engine.sampler import Sampled
from flowkv_common.engine.sequence import Sequence
from flowkv_common.phases import Phases
from flowkv_common.wire.messages import PrefillRun, transfer_id


class Prompt:
    """`progress` is set after each chunk; `first` is the first output token once all chunks are computed."""

    def __init__(self, run: PrefillRun) -> None:
        self.run = run
        self.sequence = _new_sequence(run)
        self.task: asyncio.Task[None] | None = None
        self.progress = asyncio.Event()
        self.first: Sampled | None = None
        self.phases = Phases()

    def give_away(self) -> Sequence:
        """The sequence with its blocks, for another owner; an empty one stays behind."""
        sequence, self.sequence = self.sequence, _new_sequence(self.run)
        return sequence


def _new_sequence(run: PrefillRun) -> Sequence:
    return Sequence(
        request_id=run.request_id,
        attempt=run.attempt,
        transfer_id=transfer_id(run.request_id, run.attempt),
        gateway_id=run.gateway_id,
        prompt_ids=run.prompt_ids,
        output_ids=list(run.output_ids),
        sampling=run.sampling,
        deadline=time.monotonic() + run.deadline_in_s,
    )
