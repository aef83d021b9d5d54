"""The output of recent sequences, kept so that a gateway that lost a message can ask again."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from flowkv_common.engine.sequence import Sequence
from flowkv_common.wire.messages import TokenChunk
from flowkv_common.wire.parts import TokenLogprob

KEEP_S = 30.0
# At most so many in one chunk, so that it fits into a message: 8 bytes each, or with log probabilities 800.
MAX_TOKENS = 1024
MAX_TOKENS_WITH_LOGPROBS = 16


@dataclass(slots=True)
class _Output:
    first_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Outputs:
    """By transfer id, from the first token that this node answers for."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}
        self._ended: deque[tuple[float, str]] = deque()  # when, and which; oldest first

    def open(self, sequence: Sequence) -> None:
        """A sequence begins here; the last of its `output_ids` came without log probabilities."""
        first = sequence.next_output_index - 1
        self._outputs[sequence.transfer_id] = _Output(first, [sequence.output_ids[-1]])

    def add(self, chunk: TokenChunk) -> None:
        output = self._outputs[chunk.transfer_id]
        output.token_ids += chunk.token_ids
        output.logprobs += chunk.logprobs
        output.finish_reason = chunk.finish_reason

    def end(self, transfer_id: str) -> None:
        """The sequence has left, for whatever reason; what it said is kept for a while."""
        self._ended.append((time.monotonic(), transfer_id))

    def since(self, transfer_id: str, from_index: int) -> TokenChunk | None:
        """One chunk with the tokens from `from_index` on, not all if they are many.

        None when unknown or out of reach.
        """
        output = self._outputs.get(transfer_id)
        if output is None or from_index < output.first_index:
            return None
        start = from_index - output.first_index
        if start == 0 and output.logprobs:
            return None  # prefill did not pass on the log probabilities of its own token
        end = start + (MAX_TOKENS_WITH_LOGPROBS if output.logprobs else MAX_TOKENS)
        return TokenChunk(
            transfer_id=transfer_id,
            index=from_index,
            token_ids=output.token_ids[start:end],
            logprobs=output.logprobs[start - 1 : end - 1] if start else [],
            finish_reason=output.finish_reason if end >= len(output.token_ids) else None,
        )

    def forget_old(self, now: float) -> None:
        """Drop the output of those that left a while ago."""
        while self._ended and now - self._ended[0][0] > KEEP_S:
            _, transfer_id = self._ended.popleft()
            self._outputs.pop(transfer_id, None)  # a sequence may have ended twice: failed, and cancelled
