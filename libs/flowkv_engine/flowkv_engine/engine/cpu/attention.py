"""Attention on the CPU, in compiled kernels that walk the block table.

Decode reads KV once, in the pool; a prefill computes enough per byte to pack KV for its tiles first. bfloat16
and e4m3 become float32 while they are read. Kernels are compiled at first use and cached on disk
(`NUMBA_CACHE_DIR`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from flowkv_engine.engine.attention import Prefill, Rule, TorchAttention, narrowed
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.cpu.linear import multiply
from flowkv_engine.engine.cpu.simd import LANES, score_tile, softmax_row, value_tile

# Tokens of a split of decode. Fixed, so that a sequence is summed in the same order in any batch.
SPLIT_LEN = 256
# Keys per step of a prompt's online softmax: whole tiles of scores, which stay in the second cache.
TILE_LEN = 192
TILE_QUERIES = 32  # tokens of a prompt in one unit of work
_LOWEST = np.float32(-1e30)
_NO_SINKS = np.empty(0, np.float32)
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # by their bits


class Scratch:
    """Memory kept between calls: they are many and short."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.float32]] = {}

    def array(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Uninitialized memory, valid until the next call with that name."""
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, np.float32)
        return self._arrays[name][:size].reshape(shape)


class CpuAttention(TorchAttention):
    """Equal to `TorchAttention` up to rounding, by test. For pools of float32, bfloat16 and e4m3.

    Latents are left to torch: with all heads for one key, its products are those of large matrices.
    The result of `attend` is valid until the next call. `layers` and `slots` are for kernels that write into
    the pool themselves.
    """

    name = "cpu"

    def __init__(self, layers: Sequence[Tensor]) -> None:
        super().__init__(layers)
        self.layers = [_numbers_of(layer) for layer in layers]
        self.slots = np.empty(0, np.int64)
        self._tables = np.empty((0, 0), np.int32)
        self._context_lens = np.empty(0, np.int32)
        self._split_len = max(1, SPLIT_LEN // self._block_size) * self._block_size
        self._num_splits = 0
        self._scratch = Scratch()

    def bind(self, batch: PackedBatch) -> None:
        super().bind(batch)
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # of this thread
        decode = batch.query_lens == 1
        self.slots = batch.slots
        self._tables = batch.block_tables[decode]
        self._context_lens = batch.context_lens[decode]
        self._num_splits = -(-int(self._context_lens.max(initial=0)) // self._split_len)

    def write(self, layer: int, key: Tensor, value: Tensor | None) -> None:
        if value is None:
            return super().write(layer, key, value)
        keys, values = (_as_numpy(narrowed(states, self._layers[layer].dtype)) for states in (key, value))
        _write(*self.layers[layer], keys, values, self.slots)

    def _decode(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        if self._layers[layer].shape[1] == 1:
            return super()._decode(layer, query, rule)
        num_rows, num_heads, head_dim = query.shape
        decode = make_decode(num_heads // self._layers[layer].shape[3], head_dim)
        shape = (num_rows, self._num_splits, num_heads)
        out = self._scratch.array("out", num_rows, num_heads, head_dim)
        decode(
            *self.layers[layer],
            self._split_len,
            (query.float() * rule.scale).contiguous().numpy(),
            self._tables,
            self._context_lens,
            *rule.span,
            np.float32(rule.softcap),
            _sinks(rule),
            self._scratch.array("splits", *shape, head_dim),
            self._scratch.array("maxima", *shape),
            self._scratch.array("sums", *shape),
            out,
        )
        return torch.from_numpy(out).to(query.dtype)

    def _prefill(self, layer: int, query: Tensor, item: Prefill, rule: Rule) -> Tensor:
        if self._layers[layer].shape[1] == 1:
            return super()._prefill(layer, query, item, rule)
        num_kv_heads, head_dim = self._layers[layer].shape[3:]
        num_tiles = -(-item.context_len // TILE_LEN)
        out = torch.empty(query.shape)
        prefill(
            *self.layers[layer],
            item.blocks.numpy(),
            item.context_len,
            query.float().contiguous().numpy(),
            np.float32(rule.scale),
            *rule.span,
            np.float32(rule.softcap),
            _sinks(rule),
            self._scratch.array("keys", num_kv_heads, num_tiles, TILE_LEN // LANES, head_dim, LANES),
            self._scratch.array("values", num_kv_heads, num_tiles, head_dim // LANES, TILE_LEN, LANES),
            out.numpy(),
        )
        return out.to(query.dtype)


def _sinks(rule: Rule) -> NDArray[np.float32]:
    """[num_heads], or [0] without."""
    return _NO_SINKS if rule.sinks is None else rule.sinks.detach().float().numpy()


class Numbers(NamedTuple):
    """A layer of the pool as kernels take it: the key of slot 0 is at number 0.

    A block has all keys of a token, [num_kv_heads, head_dim], then those of its next token, then the values.
    """

    pool: NDArray[Any]  # one-dimensional, to the layer's last number
    block_len: int  # numbers from a block to the next
    block_size: int


def _numbers_of(layer: Tensor) -> Numbers:
    num_blocks, block_len = len(layer), layer.stride(0)
    flat = layer.as_strided(((num_blocks - 1) * block_len + layer[0].numel(),), (1,))
    return Numbers(_as_numpy(flat), block_len, layer.shape[2])


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory; as their bits floats that numpy does not know."""
    array: NDArray[Any] = tensor.view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()
    return array


# --- Numbers of the pool: float32, or the bits of a bfloat16 or e4m3 ---


def _widened(number):
    """As float32."""
    raise NotImplementedError


@overload(_widened)
def _overload_widened(number):
    if number == types.float32:
        return lambda number: number
    if number == types.uint8:
        return lambda number: _E4M3[number]
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _stored(number, like):
    """As a pool that holds `like` stores it: rounded to the nearest, ties to even (see `narrowed`)."""
    raise NotImplementedError


@overload(_stored)
def _overload_stored(number, like):
    if like == types.float32:
        return lambda number, like: number

    def narrow(number, like):
        bits = np.float32(number).view(np.uint32)
        nearest_even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(0x7FC0) if np.isnan(number) else np.uint16(nearest_even)

    def narrow_to_e4m3(number, like):
        bits = np.float32(number).view(np.uint32)
        sign, size = (bits >> np.uint32(24)) & np.uint32(0x80), bits & np.uint32(0x7FFFFFFF)
        if size > np.uint32(0x7F800000):  # NaN
            return np.uint8(sign | np.uint32(0x7F))
        least = np.uint32(min(size, np.uint32(0x43E00000)))  # 448, the largest
        if least < np.uint32(0x3C800000):  # 2 ** -6: multiples of 2 ** -9, as floats from 2 ** 14 on are
            moved = np.float32(least.view(np.float32) + np.float32(2**14))
            code = moved.view(np.uint32) - np.uint32(0x46800000)
        else:  # 20 bits of the fraction go, and the exponent's bias is less by 120
            nearest_even = least + np.uint32(0x7FFFF) + ((least >> np.uint32(20)) & np.uint32(1))
            code = (nearest_even >> np.uint32(20)) - np.uint32(120 << 3)
        return np.uint8(sign | code)

    return narrow_to_e4m3 if like == types.uint8 else narrow


# --- Writing ---


@numba.njit(cache=True, nogil=True)
def _write(pool, block_len, block_size, keys, values, slots):
    """`keys`, `values` [T, kv heads, dim] of the pool's dtype -> the pool, at `slots` [T]."""
    _, num_kv_heads, head_dim = keys.shape
    row_len = num_kv_heads * head_dim
    for token in range(slots.shape[0]):
        at = slots[token] // block_size * block_len + slots[token] % block_size * row_len
        for head in range(num_kv_heads):
            for dim in range(head_dim):
                pool[at + head * head_dim + dim] = keys[token, head, dim]
                pool[at + block_size * row_len + head * head_dim + dim] = values[token, head, dim]


@numba.njit(cache=True, nogil=True)
def _rotate(states, cos, sin, is_interleaved, out):
    """One head [dim], its pairs rotated by `cos` and `sin` [pairs] (see `Rotary`). `out` may be `states`."""
    pairs = cos.shape[0]
    if is_interleaved:
        for pair in range(pairs):
            first, second = states[2 * pair], states[2 * pair + 1]
            out[2 * pair] = first * cos[pair] - second * sin[pair]
            out[2 * pair + 1] = second * cos[pair] + first * sin[pair]
    else:
        for pair in range(pairs):
            first, second = states[pair], states[pair + pairs]
            out[pair] = first * cos[pair] - second * sin[pair]
            out[pair + pairs] = second * cos[pair] + first * sin[pair]
    for dim in range(2 * pairs, states.shape[0]):
        out[dim] = states[dim]


@numba.njit(cache=True, nogil=True)
def _rotate_and_write_row(
    pool, block_len, block_size, slot, states, cos, sin, is_interleaved, norm, norms_together, eps, query
):  # fmt: skip
    num_heads, head_dim = query.shape
    num_kv_heads = (states.shape[0] - num_heads) // 2
    first = 0
    while first < norm.shape[0]:  # none, or all heads of queries and keys
        last = first + 1
        if norms_together:
            last = num_heads if first < num_heads else norm.shape[0]
        total = np.float32(0)
        for head in range(first, last):
            for dim in range(states.shape[1]):
                total += states[head, dim] * states[head, dim]
        factor = np.float32(1) / np.sqrt(total / np.float32((last - first) * states.shape[1]) + eps)
        for head in range(first, last):
            for dim in range(states.shape[1]):
                states[head, dim] *= factor * norm[head, dim]
        first = last
    for head in range(num_heads):
        _rotate(states[head], cos, sin, is_interleaved, query[head])
    row_len = num_kv_heads * head_dim
    for head in range(num_kv_heads):
        key, value = states[num_heads + head], states[num_heads + num_kv_heads + head]
        _rotate(key, cos, sin, is_interleaved, key)
        at = slot // block_size * block_len + slot % block_size * row_len + head * head_dim
        for dim in range(head_dim):
            like = pool[at + dim]
            pool[at + dim] = _stored(key[dim], like)
            pool[at + block_size * row_len + dim] = _stored(value[dim], like)


@numba.njit(cache=True, nogil=True, parallel=True)
def rotate_and_write(
    pool, block_len, block_size, slots, qkv, positions, rotary, norm, norms_together, eps, query
):
    """Rotates queries and keys of `qkv` [T, heads + 2 kv heads, dim] (which it spoils) to their positions.

    Keys and values go into the pool (see `Numbers`) at `slots` [T], queries into `query` [T, heads, dim].
    `rotary`: the parts of a `Rotary`; `norm`: [0 or heads + kv heads, dim], the RMS norm of heads before,
    each by itself or, if `norms_together`, all of the query, and all of the key.
    """
    cos, sin, is_interleaved = rotary
    for row in numba.prange(qkv.shape[0]):
        position = positions[row]
        _rotate_and_write_row(
            pool,
            block_len,
            block_size,
            slots[row],
            qkv[row],
            cos[position],
            sin[position],
            is_interleaved,
            norm,
            norms_together,
            eps,
            query[row],
        )


# --- What a query sees, and how a score counts ---


@numba.njit(cache=True, nogil=True, inline="always")
def _first_seen(position, window, chunk):
    """As `Span.first_seen`."""
    if chunk:
        return position - position % chunk
    return max(0, position - window + 1) if window else 0


@numba.njit(cache=True, nogil=True)
def _cap(scores, softcap):
    for place in range(scores.shape[0]):
        scores[place] = softcap * np.tanh(scores[place] / softcap)


# --- Decode: flash decoding over the block table, in splits of the context ---


@numba.njit(cache=True, nogil=True, inline="always")
def _attend_split(
    pool, block_len, block_size, row_len, query, table, seen, stop, head, softcap, out, maxima, sums,
    group_size, head_dim,
):  # fmt: skip
    """KV head `head` over tokens `seen .. stop - 1`: all scores, their softmax, then the values.

    While one block is read the next is prefetched: the processor can't guess its place.
    """
    values = block_size * row_len + head * head_dim  # behind the beginning of a block
    start = seen // block_size * block_size
    num_vectors = (stop - start + LANES - 1) // LANES
    scores = np.empty((group_size, (num_vectors + 1) * LANES), np.float32)  # a tile may reach beyond
    for first in range(start, stop, block_size):
        at = table[first // block_size] * block_len + head * head_dim
        if first + block_size < stop:
            ahead = table[first // block_size + 1] * block_len + head * head_dim
        else:
            ahead = table[start // block_size] * block_len + values
        length = min(block_size, stop - first)
        for token in range(0, length, LANES):
            row, place = token * row_len, first - start + token
            score_tile(
                query, pool, at + row, ahead + row, row_len, length - token, scores, place,
                group_size, head_dim,
            )  # fmt: skip
    if softcap:
        for group in range(group_size):
            _cap(scores[group], softcap)
    scores[:, : seen - start] = _LOWEST
    scores[:, stop - start :] = _LOWEST
    for group in range(group_size):
        maxima[group], sums[group] = softmax_row(scores[group], num_vectors, _LOWEST)
    out[:] = 0
    for first in range(start, stop, block_size):
        at = table[first // block_size] * block_len + values
        ahead = table[min(first + block_size, stop - 1) // block_size] * block_len + values
        length = min(block_size, stop - first)
        value_tile(scores, first - start, pool, at, ahead, row_len, length, out, group_size, head_dim)


@numba.njit(cache=True, nogil=True)
def _merge_splits(splits, maxima, sums, sinks, out):
    """`splits` [splits, heads, dim] with their maxima and sums [splits, heads] -> `out` [heads, dim]."""
    for head in range(out.shape[0]):
        highest = maxima[0, head]
        for split in range(1, maxima.shape[0]):
            highest = max(highest, maxima[split, head])
        total = np.float32(0)
        if sinks.shape[0]:
            highest = max(highest, sinks[head])
            total = np.exp(sinks[head] - highest)
        out[head] = 0
        for split in range(maxima.shape[0]):
            weight = np.exp(maxima[split, head] - highest)
            total += weight * sums[split, head]
            for dim in range(out.shape[1]):
                out[head, dim] += weight * splits[split, head, dim]
        for dim in range(out.shape[1]):
            out[head, dim] /= total


@functools.cache
def make_decode(group_size: int, head_dim: int) -> Callable[..., None]:
    """The decode kernel for `group_size` query heads per KV head; both sizes are compiled in.

    Its `pool`, `block_len`, `block_size` are `Numbers`; `query` (scaled) and `out` [N, heads, dim] float32;
    scratch: `splits` [N, splits, heads, dim], `maxima` and `sums` [N, splits, heads], float32. `split_len`:
    tokens per unit of work, a multiple of the block size. `head_dim`: a multiple of `LANES`. `window`,
    `chunk`, `softcap`: as of `Rule`, `sinks` [0 or heads].
    """

    @numba.njit(cache=True, nogil=True, parallel=True)
    def decode(
        pool, block_len, block_size, split_len, query, tables, context_lens, window, chunk, softcap, sinks,
        splits, maxima, sums, out,
    ):  # fmt: skip
        num_rows, num_splits, num_kv_heads = query.shape[0], splits.shape[1], query.shape[1] // group_size
        for unit in numba.prange(num_rows * num_splits * num_kv_heads):
            row, rest = unit // (num_splits * num_kv_heads), unit % (num_splits * num_kv_heads)
            split, head = rest // num_kv_heads, rest % num_kv_heads
            stop = min((split + 1) * split_len, context_lens[row])
            seen = max(split * split_len, _first_seen(context_lens[row] - 1, window, chunk))
            first, last = head * group_size, (head + 1) * group_size
            if seen < stop:
                _attend_split(
                    pool,
                    block_len,
                    block_size,
                    num_kv_heads * head_dim,
                    query[row, first:last],
                    tables[row],
                    seen,
                    stop,
                    head,
                    softcap,
                    splits[row, split, first:last],
                    maxima[row, split, first:last],
                    sums[row, split, first:last],
                    group_size,
                    head_dim,
                )
        for row in range(num_rows):
            least = _first_seen(context_lens[row] - 1, window, chunk) // split_len
            used = (context_lens[row] + split_len - 1) // split_len
            _merge_splits(
                splits[row, least:used], maxima[row, least:used], sums[row, least:used], sinks, out[row]
            )

    kernel: Callable[..., None] = decode
    return kernel


# --- Prefill: the online softmax over tiles of packed keys and values ---


@numba.njit(cache=True, nogil=True)
def _pack_tile(pool, block_len, block_size, row_len, table, head, first, context_len, keys, values):
    """The context's tile at `first`: keys [tokens / LANES, dim, LANES], values [dim / LANES, tokens, LANES].

    Padded to whole vectors with 0; the scores of padding are masked.
    """
    head_dim = keys.shape[1]
    count = min(TILE_LEN, context_len - first)
    for token in range(count):
        block, offset = table[(first + token) // block_size], (first + token) % block_size
        at = block * block_len + offset * row_len + head * head_dim
        panel, lane = token // LANES, token % LANES
        for dim in range(head_dim):
            keys[panel, dim, lane] = _widened(pool[at + dim])
            values[dim // LANES, token, dim % LANES] = _widened(pool[at + block_size * row_len + dim])
    for token in range(count, (count + LANES - 1) // LANES * LANES):
        keys[token // LANES, :, token % LANES] = 0
        values[:, token] = 0


@numba.njit(cache=True, nogil=True)
def _scale(row, factor, out):
    for dim in range(row.shape[0]):
        out[dim] = row[dim] * factor


@numba.njit(cache=True, nogil=True)
def _mask(scores, first, length, position, group_size, window, chunk):
    """Hides of `scores` [rows, length or more], of keys from `first` on, what a row's token doesn't see.

    A tile of which a row sees nothing counts until it sees something, and then times 0.
    """
    for row in range(scores.shape[0]):
        place = position + row // group_size
        for token in range(max(0, place + 1 - first), length):
            scores[row, token] = _LOWEST
        for token in range(min(_first_seen(place, window, chunk) - first, length)):
            scores[row, token] = _LOWEST


@numba.njit(cache=True, nogil=True)
def _attend_prompt(query, position, scale, window, chunk, softcap, sinks, keys, values, out):
    """`query` [tokens, group, dim], the first at `position`, attends to one KV head's tiles.

    `sinks`: [0 or group].
    """
    num_tokens, group_size, head_dim = query.shape
    num_rows = num_tokens * group_size
    queries = np.empty((num_rows, head_dim), np.float32)
    for row in range(num_rows):
        _scale(query[row // group_size, row % group_size], scale, queries[row])
    weighted = np.zeros((num_rows, head_dim), np.float32)
    maxima, sums = np.full(num_rows, _LOWEST), np.zeros(num_rows, np.float32)
    if sinks.shape[0]:
        for row in range(num_rows):
            maxima[row], sums[row] = sinks[row % group_size], np.float32(1)
    scores = np.empty((num_rows, TILE_LEN), np.float32)
    context_len = position + num_tokens
    least = _first_seen(position, window, chunk) // TILE_LEN
    for tile in range(least, (context_len + TILE_LEN - 1) // TILE_LEN):
        first = tile * TILE_LEN
        num_vectors = (min(TILE_LEN, context_len - first) + LANES - 1) // LANES
        multiply(queries, keys[tile], 0, num_vectors, head_dim, scores, False)
        if softcap:
            for row in range(num_rows):
                _cap(scores[row, : num_vectors * LANES], softcap)
        last = context_len - 1
        if first + num_vectors * LANES > position + 1 or first < _first_seen(last, window, chunk):
            _mask(scores, first, num_vectors * LANES, position, group_size, window, chunk)
        for row in range(num_rows):
            maximum, total = softmax_row(scores[row], num_vectors, maxima[row])
            if maximum > maxima[row]:
                rescale = np.exp(maxima[row] - maximum)
                sums[row] *= rescale
                _scale(weighted[row], rescale, weighted[row])
                maxima[row] = maximum
            sums[row] += total
        multiply(scores, values[tile], 0, head_dim // LANES, num_vectors * LANES, weighted, True)
    for row in range(num_rows):
        _scale(weighted[row], np.float32(1) / sums[row], out[row // group_size, row % group_size])


@numba.njit(cache=True, nogil=True, parallel=True)
def prefill(
    pool, block_len, block_size, table, context_len, query, scale, window, chunk, softcap, sinks, keys,
    values, out,
):  # fmt: skip
    """Attention of the last T of `context_len` tokens -> `out` [T, heads, dim], as `query`, float32.

    `pool`, `block_len`, `block_size`: `Numbers`; `table` [blocks]; `scale`, `window`, `chunk`, `softcap`: as
    of `Rule`, `sinks` [0 or heads]. Scratch, float32, for tiles = ceil(context_len / TILE_LEN):
    `keys` [kv heads, tiles, TILE_LEN / LANES, dim, LANES] and
    `values` [kv heads, tiles, dim / LANES, TILE_LEN, LANES].
    """
    (num_tokens, num_heads, head_dim), (num_kv_heads, num_tiles) = query.shape, keys.shape[:2]
    group_size, row_len = num_heads // num_kv_heads, num_kv_heads * head_dim
    least = _first_seen(context_len - num_tokens, window, chunk) // TILE_LEN
    for unit in numba.prange(num_kv_heads * (num_tiles - least)):
        head, tile = unit // (num_tiles - least), least + unit % (num_tiles - least)
        _pack_tile(
            pool, block_len, block_size, row_len, table, head, tile * TILE_LEN, context_len,
            keys[head, tile], values[head, tile],
        )  # fmt: skip
    num_units = (num_tokens + TILE_QUERIES - 1) // TILE_QUERIES
    for unit in numba.prange(num_units * num_kv_heads):
        # Each thread gets a run of units. One head after the other: its keys and values stay in the second
        # cache. Queries from both ends in turn: later tokens have more to attend to.
        head, place = unit // num_units, unit % num_units
        number = num_units - 1 - place // 2 if place % 2 else place // 2
        start = number * TILE_QUERIES
        stop = min(num_tokens, start + TILE_QUERIES)
        first, last = head * group_size, (head + 1) * group_size
        _attend_prompt(
            query[start:stop, first:last],
            context_len - num_tokens + start,
            scale,
            window,
            chunk,
            softcap,
            sinks[first:last],
            keys[head],
            values[head],
            out[start:stop, first:last],
        )
