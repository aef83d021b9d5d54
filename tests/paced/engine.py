"""An engine that takes the time it is told to take, by the loop's timer, and computes next to nothing.

`tests/contract/test_engines.py` holds it to what `EngineThread` promises. Its KV cache is real: each token's
slot keeps the digest of the tokens up to it, and the next token is read from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowkv_common.wire.messages import TokenLogprob
from flowkv_common.wire.nodes import StepFit
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.runner import Result
from flowkv_engine.engine.sampler import Sampled, SampleInput
from tests.paced.digest import mix, terms

# So much lateness of a step is made good by the next; more of it shows, as it would with a real engine.
SLACK_S = 0.005
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How an engine behaves: its steps' costs, the token ids that it speaks, and when it ends of itself."""

    fit: StepFit
    words: Sequence[int]
    vocab_size: int
    eos_token_id: int
    eos_after: int | None = None  # outputs, then EOS; None: never


@dataclass(frozen=True, slots=True)
class Kept:
    """How well an engine has kept its pace: what its steps should have taken, and what they took.

    `taken_s` runs from when a step was asked for, or from the end of the step that it followed on.
    """

    num_steps: int = 0
    stated_s: float = 0.0
    taken_s: float = 0.0

    @property
    def slip(self) -> float:
        """By which share of the stated time the steps were longer."""
        return self.taken_s / self.stated_s - 1.0 if self.stated_s else 0.0


def step_seconds(fit: StepFit, batch: PackedBatch) -> float:
    """What a step of this batch costs. An item of one token counts as decoding."""
    query, context = batch.query_lens.astype(np.float64), batch.context_lens.astype(np.float64)
    decodes = query == 1
    num_pairs = query * (context - query) + query * (query + 1) / 2
    return float(
        fit.base_s
        + fit.prefill_token_s * query[~decodes].sum()
        + fit.attended_token_s * num_pairs[~decodes].sum()
        + fit.sequence_s * decodes.sum()
        + fit.context_token_s * context[decodes].sum()
    )


class PacedEngine:
    """Runs steps one after the other, in the order asked for, each until its own deadline.

    A step that follows on another begins at that one's deadline: oversleeping does not add up. `slowdown`
    stretches all later steps.
    """

    def __init__(self, pool: Tensor, pace: Pace) -> None:
        """`pool` is of `paced_layout`; two floats of each token hold its digest."""
        self.busy_since: float | None = None
        self.slowdown = 1.0
        self.kept = Kept()
        self._pace = pace
        self._words = np.array(pace.words, np.int64)
        keys = pool.numpy().view(np.uint64).reshape(len(pool), 2, -1, 4)[:, 0]
        self._digests = keys[..., 0]  # [num_blocks, block_size]
        self._work: asyncio.Queue[Callable[[], Awaitable[None]] | None] = asyncio.Queue()
        self._free_at = 0.0  # the deadline of the last step
        self._ended_at = 0.0  # when it did end
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> PacedEngine:
        await self._tasks.__aenter__()
        self._worker = self._tasks.create_task(self._work_off())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._work.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.wait([self._worker])
        self._worker.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def step(self, batch: PackedBatch) -> Result:
        """The batch's tokens, when its time is over. Raises IndexError for a token out of the vocabulary."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        asked_at = time.monotonic()
        self._work.put_nowait(lambda: self._run(batch, result, asked_at))
        return await result

    def wedge(self, for_s: float) -> None:
        """Holds all later steps up for so long."""
        self._work.put_nowait(lambda: asyncio.sleep(for_s))

    async def _work_off(self) -> None:
        while (work := await self._work.get()) is not None:
            self.busy_since = time.monotonic()
            await work()
            self.busy_since = None

    async def _run(self, batch: PackedBatch, result: asyncio.Future[Result], asked_at: float) -> None:
        stated_s = self.slowdown * step_seconds(self._pace.fit, batch)
        now = time.monotonic()
        self._free_at = (self._free_at if now - self._free_at < SLACK_S else now) + stated_s
        await asyncio.sleep(self._free_at - now)
        try:
            outcome = self._compute(batch)
        except Exception as error:  # the step's caller answers for it, as with EngineThread
            if not result.done():
                result.set_exception(error)
        else:
            if not result.done():
                result.set_result(outcome)
        self._keep_books(asked_at, stated_s)

    def _keep_books(self, asked_at: float, stated_s: float) -> None:
        """The step has just ended."""
        kept, ended_at = self.kept, time.monotonic()
        began = self._ended_at if asked_at - self._ended_at < SLACK_S else asked_at
        self._ended_at = ended_at
        self.kept = Kept(kept.num_steps + 1, kept.stated_s + stated_s, kept.taken_s + ended_at - began)

    def _compute(self, batch: PackedBatch) -> Result:
        if batch.token_ids.max() >= self._pace.vocab_size:
            raise IndexError(f"token {batch.token_ids.max()} is in no vocabulary")
        starts, ends = batch.query_starts[:-1], batch.query_starts[1:]
        added = terms(batch.token_ids, batch.position_ids)  # [T]
        sums = np.cumsum(added, dtype=np.uint64)
        base = self._digests_before(batch) - (sums[starts] - added[starts])  # [N], modulo 2**64
        digests = sums + np.repeat(base, batch.query_lens)
        for start, sample in zip(starts.tolist(), batch.samples, strict=True):
            if sample is not None and sample.is_drafted:  # it goes on from the item before it
                digests[start : start + 1] = digests[start - 1 : start] + added[start : start + 1]
        block_size = self._digests.shape[1]
        self._digests[batch.slots // block_size, batch.slots % block_size] = digests
        picks = self._words[mix(digests[ends - 1]) % np.uint64(len(self._words))].tolist()
        sampled = [
            None if sample is None else self._sampled(sample, pick)
            for sample, pick in zip(batch.samples, picks, strict=True)
        ]
        prompt_logprobs = {
            rows.item: [TokenLogprob(token_id=token_id, logprob=0.0, rank=1) for token_id in rows.token_ids]
            for rows in batch.prompt_rows
        }
        return Result(sampled, prompt_logprobs)

    def _digests_before(self, batch: PackedBatch) -> NDArray[np.uint64]:
        """The digest of what precedes each item, out of the last slot before it: [N], 0 where it begins."""
        block_size = self._digests.shape[1]
        begins = batch.context_lens - batch.query_lens
        last = np.maximum(begins - 1, 0)
        blocks = batch.block_tables[np.arange(len(last)), last // block_size]
        return np.where(begins > 0, self._digests[blocks, last % block_size], np.uint64(0))

    def _sampled(self, sample: SampleInput, pick: int) -> Sampled:
        pace, num_logprobs = self._pace, sample.sampling.num_logprobs
        ends = pace.eos_after is not None and sample.output_index >= pace.eos_after
        token_id = pace.eos_token_id if ends else pick
        if num_logprobs is None:
            return Sampled(token_id, None)
        top = [(token_id, 0.0)] if num_logprobs else []
        return Sampled(token_id, TokenLogprob(token_id=token_id, logprob=0.0, top=top))
