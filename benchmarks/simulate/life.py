"""One request on its way through the simulated cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulate.pool import Lease
from benchmarks.traces import TOKENS_PER_HASH_ID, Request


@dataclass(slots=True, eq=False)
class Life:
    """What has happened to a request so far. Times in seconds of the simulation, 0 until they are known."""

    number: int
    request: Request
    prefill: int = -1  # index of the node
    decode: int = -1
    at_prefill: Lease | None = None
    at_decode: Lease | None = None
    block_hashes: list[str] = field(default_factory=list)  # while it asks for nodes
    num_waits: int = 0
    num_cached_tokens: int = 0  # that prefill did not compute
    num_moved_tokens: int = 0  # that decode did not have
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    refused_with: int = 0  # the code of the error
    is_bad: bool = False  # it has missed a target

    @property
    def cacheable_ids(self) -> Sequence[int]:
        """Ids that name whole stretches of the prompt. Its last token is always computed."""
        return self.request.hash_ids[: (self.request.num_prompt_tokens - 1) // TOKENS_PER_HASH_ID]

    def num_early_blocks(self, block_size: int, num_to_come: int | None = None) -> int:
        """Blocks for the tokens that are still to come: of the whole answer but its first, or fewer."""
        num_all = self.request.num_prompt_tokens + self.request.num_output_tokens
        num_now = num_all - (self.request.num_output_tokens - 1 if num_to_come is None else num_to_come)
        return -(-num_all // block_size) + (-num_now // block_size)

    @property
    def is_done(self) -> bool:
        return self.last_token_s > 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 where there is none."""
        num_intervals = self.request.num_output_tokens - 1
        return (self.last_token_s - self.first_token_s) / num_intervals if num_intervals else 0.0

    @property
    def total_s(self) -> float:
        return self.last_token_s - self.request.arrival_s
