"""Compares a node's own forward pass with the model's, once, before anybody is served.

What is known not to work is refused before weights are read. This is for what nobody has thought of: a kernel
that is wrong on some machine, or a state that a model keeps beside its KV cache and does not tell of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowkv_common.engine.attention import IMPLEMENTATION
from flowkv_common.engine.batch import PackedBatch, WorkItem, pack
from flowkv_common.engine.quiet import quiet
from flowkv_common.engine.sequence import Sequence
from flowkv_common.engine.servable import UnsupportedModel
from flowkv_common.wire.parts import SamplingParams

PROMPT_LENS = (9, 6)  # tokens; the last one of each is computed in a step of its own
# How far logits may lie from the model's own, as a share of their spread and in units of rounding: 3 % in
# float32, 50 % in bfloat16. Rounding costs up to 35 units; another position, mask or neighbour 20 % or more.
TOLERANCE = 64.0
FINEST = 5e-4  # a GPU may multiply float32 with 11 bits


class SelfCheck:
    """Two short prompts and what the model itself makes of them: a forward pass of its modules for each."""

    def __init__(self, module: nn.Module, pool: Tensor, max_model_len: int, vocab_size: int) -> None:
        """To be made while `module` has its weights. A pool of one block has room for one prompt only."""
        num_blocks, block_size = pool.shape[0], pool.shape[3]
        longest = min(block_size, max_model_len)
        lens = [min(wanted, longest) for wanted in PROMPT_LENS[:num_blocks]] if longest > 1 else []
        generator = torch.Generator().manual_seed(0)
        dtypes = {next(module.parameters()).dtype, pool.dtype}
        self._tolerance = TOLERANCE * max(FINEST, *(torch.finfo(dtype).eps for dtype in dtypes))
        self._block_size = block_size
        self._prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lens]
        self._expected = [_plain_logits(module, prompt) for prompt in self._prompts]

    def run(self, logits_of: Callable[[PackedBatch], Tensor]) -> None:
        """`logits_of` computes a batch: logits [S, vocab]. Raises `UnsupportedModel` if they are others."""
        for num_left in (1, 0) if self._prompts else ():  # all tokens but the last one, then the last one
            items, expected = [], []
            for block, (prompt, logits) in enumerate(zip(self._prompts, self._expected, strict=True)):
                end = len(prompt) - num_left
                start = len(prompt) - 1 if num_left == 0 else 0
                items.append(_item(prompt[:end], start, block))
                expected.append(logits[end - 1])
            self._compare(logits_of(pack(items, self._block_size)).float(), torch.stack(expected))

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
        error = ((got - expected).norm(dim=-1) / spread).max().item()
        if not error <= self._tolerance:  # NaN too
            raise UnsupportedModel(
                "its answers would be wrong: the forward pass that serves gives other logits than the model, "
                f"by {error:.0%} of their spread"
            )


def _item(token_ids: list[int], num_computed: int, block: int) -> WorkItem:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    sequence = Sequence("", 0, "self-check", "", token_ids, [], sampling, 0.0, [block])
    sequence.num_computed_tokens = num_computed
    return WorkItem(sequence, len(token_ids) - num_computed)


@torch.inference_mode()
def _plain_logits(module: Any, token_ids: list[int]) -> Tensor:
    """[len(token_ids), vocab] in float32, with attention as the model's authors wrote it."""
    device = next(module.parameters()).device
    with quiet():
        module.set_attn_implementation("eager")
        output = module(torch.tensor([token_ids], device=device), use_cache=False)
        module.set_attn_implementation(IMPLEMENTATION)
    logits: Tensor = output.logits[0].float()
    return logits
