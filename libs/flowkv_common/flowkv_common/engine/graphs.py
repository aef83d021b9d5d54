"""Steps of decode as recorded graphs: one launch instead of some hundred per layer, from fixed memory.

A graph is recorded for each of a few batch sizes. A step takes the next larger one; the places that are left
over have an empty context and write nowhere. Only `TritonFlatForward` can be recorded: it never asks the
device for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.attention_triton import Decoding, TritonAttention
from flowkv_common.engine.batch import PackedBatch
from flowkv_common.engine.flat_triton import TritonFlatForward
from flowkv_common.engine.modules import Forward

# Replays what it was given, into the same tensor.
Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]

MAX_BATCH = 256


def batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every eighth, up to the first that holds `max_num_seqs` or `MAX_BATCH`."""
    sizes = [1, 2, 4, *range(8, MAX_BATCH + 1, 8)]
    most = next(size for size in sizes if size >= min(max_num_seqs, MAX_BATCH))
    return [size for size in sizes if size <= most]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What the graphs read and write, for the largest batch; a smaller one has the front of it."""

    token_ids: Tensor  # [B] int64
    position_ids: Tensor  # [B] int64
    slots: Tensor  # [B] int64, -1: written nowhere
    context_lens: Tensor  # [B] int32, 0: an empty place
    tables: Tensor  # [B, most blocks of a sequence] int32
    rows: Tensor  # [B] int32: 0, 1, 2, ...
    logits: Tensor  # [B, vocab]: what they write, all into one, or each would keep its own


class GraphedDecode:
    """Batches of one token per item, all sampled. `record` makes a graph of what a function launches."""

    def __init__(
        self,
        forward: TritonFlatForward,
        attention: TritonAttention,
        *,
        max_num_seqs: int,
        max_num_blocks: int,
        device: torch.device,
        record: Record,
    ) -> None:
        """Records all sizes, the largest first: the others fit into its memory. Seconds each."""
        sizes = batch_sizes(max_num_seqs)
        most = sizes[-1]
        self._memory = _Memory(
            token_ids=torch.zeros(most, dtype=torch.int64, device=device),
            position_ids=torch.zeros(most, dtype=torch.int64, device=device),
            slots=torch.full((most,), -1, dtype=torch.int64, device=device),
            context_lens=torch.zeros(most, dtype=torch.int32, device=device),
            tables=torch.zeros((most, max_num_blocks), dtype=torch.int32, device=device),
            rows=torch.arange(most, dtype=torch.int32, device=device),
            logits=torch.empty(most, len(forward.head), dtype=forward.head.dtype, device=device),
        )
        self._places = torch.arange(most, device=device)
        self._forward = forward
        self._attention = attention
        self._replays = {size: record(self._step(size)) for size in reversed(sizes)}
        self._sizes = sizes

    def fits(self, batch: PackedBatch) -> bool:
        num_items = len(batch.query_lens)
        return (
            num_items <= self._sizes[-1]
            and len(batch.token_ids) == num_items == len(batch.logits_indices)
            and batch.block_tables.shape[1] <= self._memory.tables.shape[1]
        )

    def run(self, batch: PackedBatch) -> Tensor:
        """Logits [N, vocab], valid until the next call."""
        num_items = len(batch.token_ids)
        size = next(size for size in self._sizes if size >= num_items)
        memory = self._memory
        memory.slots[num_items:size] = -1
        memory.context_lens[num_items:size] = 0
        _fill(memory.token_ids, batch.token_ids)
        _fill(memory.position_ids, batch.position_ids)
        _fill(memory.slots, batch.slots)
        _fill(memory.context_lens, batch.context_lens)
        _fill(memory.tables[:, : batch.block_tables.shape[1]], batch.block_tables)
        return self._replays[size]()[:num_items]

    def _step(self, size: int) -> Callable[[], Tensor]:
        memory = self._memory
        decoding = Decoding(memory.rows[:size], memory.tables[:size], memory.context_lens[:size])

        def step() -> Tensor:
            self._attention.bind_static(memory.slots[:size], decoding)
            logits = self._forward(
                memory.token_ids[:size], memory.position_ids[:size], self._attention, self._places[:size]
            )
            return memory.logits[:size].copy_(logits)

        return step


class CudaRecorder:
    """Records on a stream of its own, as CUDA asks for. All graphs share one pool of memory: one runs at a
    time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles what has to be compiled
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def make_graphs(
    forward: Forward, attention: Attention, pool: Tensor, *, max_num_seqs: int, max_model_len: int
) -> GraphedDecode | None:
    """The graphs of a model on a GPU; `None` where nothing can be recorded."""
    if pool.device.type != "cuda" or not isinstance(forward, TritonFlatForward):
        return None
    if not isinstance(attention, TritonAttention):
        return None
    num_blocks, block_size = pool.shape[0], pool.shape[3]
    return GraphedDecode(
        forward,
        attention,
        max_num_seqs=max_num_seqs,
        max_num_blocks=min(num_blocks, -(-max_model_len // block_size)),
        device=pool.device,
        record=CudaRecorder(),
    )


def _fill(tensor: Tensor, array: NDArray[np.integer]) -> None:
    tensor[: len(array)].copy_(torch.from_numpy(array))
