"""What the services add to a first token: its TTFT less what its own node took to compute it.

Both are of the same request, so it does not matter how fast the host is in that minute.
"""

from __future__ import annotations

import asyncio
import random

from benchmarks.load.arrivals import Arrival
from benchmarks.load.client import Outcome, stream
from benchmarks.load.summary import Quantiles, quantiles
from benchmarks.model import TOKEN_IDS
from benchmarks.serving.loop import RequestFailed
from benchmarks.serving.servers import Server
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import RequestFinished

NUM_TOKENS = 10
_NUM_OUTPUTS = 3  # no other load asks for so many: its events may come late
_TIMEOUT_S = 60.0


async def added(server: Server, num_requests: int) -> Quantiles:
    """Of prompts of 10 tokens, one after the other; seconds. Raises RequestFailed."""
    rng = random.Random(NUM_TOKENS)
    finished: asyncio.Queue[RequestFinished] = asyncio.Queue()
    subject = subjects.event("request_finished", ">")
    found = []
    async with (
        connect(server.nats_url, name="benchmark") as bus,
        await bus.subscribe(subject, RequestFinished, lambda event, _: finished.put_nowait(event)),
    ):
        for _ in range(num_requests):
            outcome = Outcome(Arrival(0.0, NUM_TOKENS, _NUM_OUTPUTS), 0.0)
            await stream(server.url, rng.choices(TOKEN_IDS, k=NUM_TOKENS), outcome, timeout_s=_TIMEOUT_S)
            if outcome.ttft_s is None:
                raise RequestFailed(f"a short prompt: {outcome.error or outcome.status}")
            found.append(outcome.ttft_s - await _prefill_s(finished))
    return quantiles(found)


async def _prefill_s(finished: asyncio.Queue[RequestFinished]) -> float:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while (event := await finished.get()).num_output_tokens != _NUM_OUTPUTS:
                pass
    except TimeoutError:
        raise RequestFailed("a short prompt: no event of its end came") from None
    return event.phases_s["prefill"]
