"""`GET /health/deep`: a request of two tokens, one from each node, through every pair that could serve one.

It finds what no load report tells: a link that takes bytes and delivers none, a right that is missing on
NATS, an engine that computes nothing.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable

from flowkv_common.errors import FlowKVError
from flowkv_common.wire.deep_health import DeepHealth, TriedPair
from flowkv_common.wire.messages import SamplingParams
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_gateway.dispatch import Dispatch
from flowkv_gateway.request_state import RequestState

# Pairs are tried at most once in this time, however often one asks.
PERIOD_S = 30.0
TIMEOUT_S = 10.0
MAX_AT_ONCE = 16
# Of more pairs so many are drawn: 16 nodes of each side.
MAX_PAIRS = 256
# Less than a block, so that it takes no room in a prefix cache and is always sent.
PROMPT_IDS = (1, 2, 3)
# The first comes from prefill, the second from decode.
NUM_TOKENS = 2


class Canary:
    """Tries the pairs when asked. Whoever asks too soon gets what was found last."""

    def __init__(self, dispatch: Dispatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatch = dispatch
        self._clock = clock
        self._trying = asyncio.Lock()
        self._tried_at: float | None = None
        self._num_pairs = 0
        self._pairs: list[TriedPair] = []

    async def health(self) -> DeepHealth:
        """It is well if there are pairs, and all that were tried have answered."""
        async with self._trying:
            now = self._clock()
            # That there is no pair costs nothing to find out again.
            if self._tried_at is None or not self._pairs or now - self._tried_at >= PERIOD_S:
                self._tried_at = now
                await self._try_pairs()
            num_failed = sum(not pair.ok for pair in self._pairs)
            why_not = f"{num_failed} of {len(self._pairs)} pairs failed" if num_failed else None
            if not self._pairs:
                why_not = "no pair of nodes could serve a request"
            return DeepHealth(
                ok=why_not is None,
                why_not=why_not,
                age_s=round(self._clock() - self._tried_at, 3),
                num_pairs=self._num_pairs,
                pairs=self._pairs,
            )

    async def _try_pairs(self) -> None:
        pairs = self._dispatch.live_pairs()
        self._num_pairs = len(pairs)
        if len(pairs) > MAX_PAIRS:
            pairs = random.sample(pairs, MAX_PAIRS)
        places = asyncio.Semaphore(MAX_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            tried = [tasks.create_task(self._try_pair(places, *pair)) for pair in pairs]
        self._pairs = [task.result() for task in tried]

    async def _try_pair(
        self, places: asyncio.Semaphore, prefill: NodeDescriptor, decode: NodeDescriptor
    ) -> TriedPair:
        request = RequestState(
            request_id=f"canary-{secrets.token_hex(8)}",
            prompt_ids=list(PROMPT_IDS),
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
            deadline_s=TIMEOUT_S,
            fingerprint=prefill.model.fingerprint,
        )
        async with places:
            began = time.monotonic()
            error = None
            try:
                await self._dispatch.run_on(request, prefill.node, decode.node)
            except FlowKVError as failed:
                error = failed.message
        return TriedPair(
            prefill=prefill.node.node_id,
            decode=decode.node.node_id,
            ok=error is None,
            ms=round(1e3 * (time.monotonic() - began), 1),
            error=error,
        )
