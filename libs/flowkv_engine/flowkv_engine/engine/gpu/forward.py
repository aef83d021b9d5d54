"""The flat forward on a GPU, and its steps as recorded graphs: one launch instead of some hundred.

A graph is recorded for each of a few sizes, over fixed memory. A step takes the next larger one; the places
left over have an empty context and write nowhere. Some graphs take decode alone, others prompts and decode.
Larger steps are not recorded: they keep the device busy while the host launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding

from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.experts import Activation
from flowkv_engine.engine.flat import FlatWeights, Layer, Mlp
from flowkv_engine.engine.forward import FlatStates, norm_heads
from flowkv_engine.engine.gpu import kernels
from flowkv_engine.engine.gpu.attention import NUM_ROWS, Step, TritonAttention, query_tiles
from flowkv_engine.engine.gpu.linear import FusedLinear

GATE_TILE_LEN = 1024
LONG_ROW = 4096  # numbers; a longer row takes twice the threads

MAX_BATCH = 256
# Of a step with prompts: items, more than the default's 64 that decode, and the numbers of tokens that graphs
# are recorded for.
MAX_ITEMS = 96
TOKEN_SIZES = (64, 128, 192, 256, 384, 512, 640, 768, 1024)

# Makes a graph of what a function launches; calling that replays it, into the same tensor.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class _Mlp:
    def __init__(self, mlp: Mlp, device: torch.device) -> None:
        self._gate_up, self._down = FusedLinear(mlp.gate_up, device), FusedLinear([mlp.down], device)
        self._activation = mlp.activation

    def __call__(self, states: Tensor) -> Tensor:
        return self._down(_gate(self._gate_up(states), self._activation))


class _Linears:
    """Those of a layer."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.qkv, self.output = FusedLinear(layer.qkv, device), FusedLinear([layer.output], device)
        self.mlp = None if layer.mlp is None else _Mlp(layer.mlp, device)


class TritonFlatForward(FlatStates):
    """Equal to `FlatForward` up to rounding, by test. It never reads a number from the device."""

    def __init__(self, weights: FlatWeights, attention: TritonAttention) -> None:
        """The model's projections are fused in place; those that are stored go to the device."""
        self.weights = weights
        self.attention = attention
        device = weights.norm.device
        self._linears = [_Linears(layer, device) for layer in weights.layers]
        self._head = FusedLinear([weights.head], device)
        self._input_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]

    @property
    def can_be_recorded(self) -> bool:
        """Whether graphs can hold it: torch has grouped products without a look at the host for bfloat16 on
        Hopper and Blackwell alone."""
        table = self.weights.embedding.weight
        if all(layer.experts is None for layer in self.weights.layers):
            return True
        is_new = table.is_cuda and torch.cuda.get_device_capability(table.device)[0] in (9, 10)
        return is_new and table.dtype == torch.bfloat16

    def states(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        weights, attention = self.weights, self.attention
        hidden = embedding(token_ids, weights.embedding.weight)  # [T, hidden]
        if weights.embedding_scale != 1:
            hidden *= weights.embedding_scale
        normed = self._add_and_norm(hidden, None, weights.layers[0].input_norm)
        for index, (layer, linears) in enumerate(zip(weights.layers, self._linears, strict=True)):
            qkv = linears.qkv(normed).view(len(normed), -1, weights.head_dim)
            norm = layer.qk_norm
            if layer.norms_together:
                qk, value = qkv.tensor_split([-weights.num_kv_heads], dim=1)
                qkv = torch.cat((norm_heads(qk, layer, weights.num_heads, weights.eps), value), dim=1)
                norm = None
            query = attention.rotate_and_write(index, qkv, position_ids, layer.rotary, norm, weights.eps)
            attended = attention.attend(index, query, layer.rule).flatten(1)
            if index == len(weights.layers) - 1 and len(rows) < len(hidden):
                # The last layer needs only keys and values of the other rows.
                hidden, attended = (each.index_select(0, rows) for each in (hidden, attended))
            added = self._norm(linears.output(attended), layer.attention_out_norm)
            normed = self._add_and_norm(hidden, added, layer.mlp_norm)
            delta = None if layer.experts is None else layer.experts(normed)
            if linears.mlp is not None:
                added = self._norm(linears.mlp(normed), layer.mlp_out_norm)
                delta = added if delta is None else delta + added
            normed = self._add_and_norm(hidden, delta, self._input_norms[index])
        return normed

    def logits(self, states: Tensor) -> Tensor:
        return self.weights.cap(self._head(states))

    def _norm(self, states: Tensor, weight: Tensor | None) -> Tensor:
        return states if weight is None else self._add_and_norm(states, None, weight)

    def _add_and_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """The norm [T, hidden] of the sum, which `hidden` becomes."""
        num_dims, result = hidden.shape[1], torch.empty_like(hidden)
        kernels.add_and_norm[(len(hidden),)](
            hidden,
            hidden if delta is None else delta,
            weight,
            result,
            self.weights.eps,
            num_dims=num_dims,
            padded_dims=triton.next_power_of_2(num_dims),
            adds=delta is not None,
            num_warps=8 if num_dims >= LONG_ROW else 4,
        )
        return result


def _gate(gate_up: Tensor, activation: Activation) -> Tensor:
    num_rows, num_dims = len(gate_up), gate_up.shape[1] // 2
    result = torch.empty(num_rows, num_dims, dtype=gate_up.dtype, device=gate_up.device)
    kernels.gate[(num_rows, triton.cdiv(num_dims, GATE_TILE_LEN))](
        gate_up, result, *activation, num_dims=num_dims, tile_len=GATE_TILE_LEN
    )
    return result


class Shape(NamedTuple):
    """What a graph has places for. A step of decode alone has as many tokens as items."""

    num_tokens: int
    num_items: int

    @property
    def has_prompts(self) -> bool:
        return self.num_tokens > self.num_items

    @property
    def num_tiles(self) -> int:
        """Of queries of prompts: each item can have one that is not full."""
        return self.num_tokens // NUM_ROWS + self.num_items


def graph_shapes(max_num_seqs: int, token_budget: int) -> list[Shape]:
    """In the order in which a step looks for one that it fits into.

    Decode: 1, 2, 4, 8, then every eighth, up to the first that holds `max_num_seqs` or `MAX_BATCH`.
    """
    batches = [1, 2, 4, *range(8, MAX_BATCH + 1, 8)]
    most_items = next(size for size in batches if size >= min(max_num_seqs, MAX_BATCH))
    most_tokens = next((size for size in TOKEN_SIZES if size >= token_budget), TOKEN_SIZES[-1])
    return [
        *(Shape(size, size) for size in batches if size <= most_items),
        *(Shape(size, min(size // 2, MAX_ITEMS)) for size in TOKEN_SIZES if size <= most_tokens),
    ]


class _Numbers:
    """Integers that are written on the host and read on the device."""

    def __init__(self, initial: NDArray[np.integer], device: torch.device) -> None:
        on_host = torch.from_numpy(initial)
        self._on_host = on_host.pin_memory() if device.type == "cuda" else on_host
        self.host: NDArray[np.integer] = self._on_host.numpy()
        self.device = self._on_host.to(device, copy=True)

    def copy_to_device(self) -> None:
        """All in one copy. They may be written again once the step has ended."""
        self.device.copy_(self._on_host, non_blocking=True)


class GraphedSteps:
    """One recorded graph per shape, and the memory that all of them read and write.

    The memory is that of the largest shapes; a smaller one has the front of it.
    """

    def __init__(
        self,
        forward: TritonFlatForward,
        *,
        max_num_seqs: int,
        token_budget: int,
        max_num_blocks: int,
        record: Record,
    ) -> None:
        """Records all shapes, the largest first: the others fit into its memory. Some 50 ms each."""
        self._forward = forward
        self._shapes = graph_shapes(max_num_seqs, token_budget)
        num_tokens, num_items, num_tiles = (
            max(numbers)
            for numbers in zip(*((*shape, shape.num_tiles) for shape in self._shapes), strict=True)
        )
        num_logits, table = forward.weights.head.out_features, forward.weights.embedding.weight
        # Token ids, positions, slots (-1: written nowhere), places to sample from.
        tokens = np.zeros((4, num_tokens), np.int64)
        tokens[2] = -1
        self._tokens = _Numbers(tokens, table.device)
        # Context lengths, those of items of one token alone, where an item begins. 0: an empty place.
        self._items = _Numbers(np.zeros((3, num_items + 1), np.int32), table.device)
        # Of the tiles of prompts: the item, the first query. -1: an empty place.
        self._tiles = _Numbers(np.full((2, num_tiles), -1, np.int32), table.device)
        self._tables = torch.zeros((num_items, max_num_blocks), dtype=torch.int32, device=table.device)
        # One for all graphs, or each would keep its own.
        self._logits = torch.empty(num_items, num_logits, dtype=table.dtype, device=table.device)
        self._replays = {shape: record(self._launches(shape)) for shape in sorted(self._shapes, reverse=True)}

    def shape_of(self, batch: PackedBatch) -> Shape | None:
        """The smallest that has places for all of `batch`."""
        num_items, num_tokens = len(batch.query_lens), len(batch.token_ids)
        if batch.block_tables.shape[1] > self._tables.shape[1]:
            return None
        decodes = num_tokens == num_items == len(batch.logits_indices)
        for shape in self._shapes:
            fits = shape.num_tokens >= num_tokens and shape.num_items >= num_items
            if fits and shape.has_prompts != decodes:
                return shape
        return None

    def run(self, batch: PackedBatch, shape: Shape) -> Tensor:
        """Logits [S, vocab], valid until the next call. `shape` is that of the batch."""
        num_items, num_tokens, num_logits = (
            len(array) for array in (batch.query_lens, batch.token_ids, batch.logits_indices)
        )
        tokens = self._tokens.host
        tokens[:3, :num_tokens] = batch.token_ids, batch.position_ids, batch.slots
        tokens[2, num_tokens : shape.num_tokens] = -1
        tokens[3, :num_logits] = batch.logits_indices
        tokens[3, num_logits : shape.num_items] = 0
        self._tokens.copy_to_device()
        items = self._items.host
        items[:2, :num_items] = batch.context_lens, batch.decode_lens
        items[:2, num_items : shape.num_items] = 0
        items[2, : num_items + 1] = batch.query_starts
        self._items.copy_to_device()
        if shape.has_prompts:
            tiles = query_tiles(batch.query_lens)
            self._tiles.host[:, : tiles.shape[1]] = tiles
            self._tiles.host[:, tiles.shape[1] : shape.num_tiles] = -1
            self._tiles.copy_to_device()
        self._tables[:num_items, : batch.block_tables.shape[1]].copy_(torch.from_numpy(batch.block_tables))
        return self._replays[shape]()[:num_logits]

    def _launches(self, shape: Shape) -> Callable[[], Tensor]:
        num_tokens, num_items = shape
        token_ids, position_ids, slots, places = self._tokens.device[:, :num_tokens]
        context_lens, decode_lens, query_starts = self._items.device
        step = Step(
            slots=slots,
            tables=self._tables[:num_items],
            context_lens=context_lens,
            query_starts=query_starts,
            decode_lens=decode_lens[:num_items],
            tiles=self._tiles.device[:, : shape.num_tiles] if shape.has_prompts else None,
        )

        def launch() -> Tensor:
            self._forward.attention.step = step
            logits = self._forward(token_ids, position_ids, places[:num_items])
            return self._logits[:num_items].copy_(logits)

        return launch


def cuda_recorder() -> Record:
    """Records CUDA graphs on the current device."""
    # On a side stream, as CUDA wants it. One for all graphs, as cuBLAS keeps memory for each stream; one pool
    # of memory for all, as one graph runs at a time.
    memory = torch.cuda.graph_pool_handle()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles what has to be compiled
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=aside):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record
