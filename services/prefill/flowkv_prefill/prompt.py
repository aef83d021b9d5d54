"""A prompt on its prefill node: its sequence, its task, and the news that the task waits for."""

from __future__ import annotations

import asyncio
import time

from flowkv_common.engine.sampler import Sampled
from flowkv_common.engine.sequence import Sequence
from flowkv_common.phases import Phases
from flowkv_common.wire.messages import PrefillRun, transfer_id


class Prompt:
    """`progress` is set after each chunk, `computed` after the last, which gives `first`, an output token.

    `number` grows from prompt to prompt: its place where prompts wait.
    """

    def __init__(self, run: PrefillRun, number: int) -> None:
        self.run = run
        self.number = number
        self.sequence = _new_sequence(run)
        self.task: asyncio.Task[None] | None = None
        self.progress = asyncio.Event()
        self.computed = asyncio.Event()
        self.computed_at = 0.0  # on the monotonic clock
        self.first: Sampled | None = None
        self.phases = Phases()

    def advance(self, sampled: Sampled | None) -> None:
        """One more chunk is computed; the last one comes with a token."""
        if sampled is not None:
            self.first, self.computed_at = sampled, time.monotonic()
            self.computed.set()
        self.progress.set()

    def forget_sequence(self) -> None:
        """The sequence has another owner now, its blocks too: an empty one takes its place."""
        self.sequence = _new_sequence(self.run)


def _new_sequence(run: PrefillRun) -> Sequence:
    return Sequence(
        request_id=run.request_id,
        attempt=run.attempt,
        transfer_id=transfer_id(run.request_id, run.attempt),
        gateway_id=run.gateway_id,
        prompt_ids=run.prompt_ids.unpack(),
        output_ids=run.output_ids.unpack(),
        sampling=run.sampling,
        deadline=time.monotonic() + run.deadline_in_s,
    )
