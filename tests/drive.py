"""Drives an engine without a node: makes sequences on blocks of any order and steps them to the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from flowkv_common.wire.messages import SamplingParams, transfer_id
from flowkv_engine.engine.batch import Sequence, WorkItem, pack
from flowkv_engine.engine.model import CPU, LoadedModel, load_model
from flowkv_engine.engine.runner import Runner
from flowkv_engine.kv.pool import layer_views

BLOCK_SIZE = 8
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)

_numbers: Iterator[int] = itertools.count()


def load_tiny(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    *,
    load_format: str = "auto",
    overrides: str = "",
    longest: int = 0,
) -> LoadedModel:
    return load_model(
        str(folder),
        name=None,
        dtype=str(dtype).removeprefix("torch."),
        load_format=load_format,
        device=device,
        overrides=overrides,
        longest=longest,
    )


def make_pool(
    model: LoadedModel,
    num_blocks: int,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = BLOCK_SIZE,
    fill: float = torch.nan,
) -> list[torch.Tensor]:
    """The layers of a pool full of NaN: what is read without having been written shows."""
    layout = model.layout(block_size, str(dtype).removeprefix("torch."))
    numbers = layout.block_bytes // dtype.itemsize
    return layer_views(torch.full((num_blocks, numbers), fill, dtype=dtype, device=model.device), layout)


def make_sequence(
    prompt_ids: list[int], block_table: list[int] | None = None, sampling: SamplingParams = GREEDY
) -> Sequence:
    return Sequence(
        transfer_id=transfer_id(f"r{next(_numbers)}", 0),
        gateway_id="g",
        prompt_ids=prompt_ids,
        output_ids=[],
        sampling=sampling,
        deadline=float("inf"),
        block_table=[] if block_table is None else block_table,
    )


def step(runner: Runner, items: list[WorkItem]) -> None:
    """Runs one batch and books its outcome."""
    result = runner.run(pack(items, BLOCK_SIZE))
    for item, token in zip(items, result.sampled, strict=True):
        item.sequence.num_computed_tokens += item.num_tokens
        if token is not None:
            item.sequence.output_ids.append(token.token_id)


def generate(runner: Runner, sequences: list[Sequence], num_outputs: int, chunk_tokens: int = 512) -> None:
    """Steps all `sequences` together, prompts in chunks, until each has `num_outputs` tokens."""
    while running := [sequence for sequence in sequences if len(sequence.output_ids) < num_outputs]:
        step(runner, [WorkItem(sequence, min(chunk_tokens, sequence.num_new_tokens)) for sequence in running])
