"""One attempt of a request as a node computes it: its tokens, its blocks, and how far it has got.

Owned by the asyncio loop. Knows neither pool nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowkv_common.fingerprint import chained_hash
from flowkv_common.wire.messages import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens `0 .. num_computed_tokens - 1` have their KV in the blocks of `block_table`."""

    transfer_id: str  # of the request and the attempt
    gateway_id: str
    prompt_ids: list[int]  # never changed: a running step may hold it
    output_ids: list[int]
    sampling: SamplingParams
    deadline: float  # monotonic seconds
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the computed ones: found in the prefix cache
    num_committed_blocks: int = 0  # of its full blocks: known to the prefix cache
    _hashes: list[str] = field(default_factory=list, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding, since the last one always is."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_new_tokens > 1

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """`(prompt_ids + output_ids)[start:stop]` without building the whole list."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_ids[start:stop] + self.output_ids[: max(0, stop - num_prompt)]

    def full_block_hashes(self, fingerprint: str, block_size: int) -> list[str]:
        """`block_hashes` of all tokens so far; only blocks that are new get hashed."""
        hashes = self._hashes
        while (len(hashes) + 1) * block_size <= self.num_tokens:
            start = len(hashes) * block_size
            block = self.tokens_between(start, start + block_size)
            hashes.append(chained_hash(fingerprint, hashes[-1] if hashes else None, block))
        return hashes.copy()

    def finish_reason_after(self, token_id: int, eos_ids: list[int], max_model_len: int) -> str | None:
        """Why the request ends if `token_id` is its next output: "stop", "length", or `None` to go on.

        Ask before appending. An EOS, or one of the request's own `stop_token_ids`, counts once `min_tokens`
        outputs stand before it.
        """
        sampling = self.sampling
        num_outputs = len(self.output_ids)
        ends_text = token_id in eos_ids and not sampling.ignore_eos
        if (ends_text or token_id in sampling.stop_token_ids) and num_outputs >= sampling.min_tokens:
            return "stop"
        if num_outputs + 1 >= sampling.max_tokens or self.num_tokens + 1 >= max_model_len:
            return "length"
        return None
