"""The compiled attention of several new tokens of a sequence to all of its tokens so far.

Scores and weighted values are both products by panels (`kernels_linear.py`). A token's sums run over its
context in parts that begin at fixed positions, so it gets the same bits however its prompt was cut into
chunks. Compiled at first use and cached on disk (`NUMBA_CACHE_DIR`). Knows arrays only.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from flowkv_common.engine.kernels_linear import multiply
from flowkv_common.engine.simd import softmax_row
from flowkv_common.engine.vector_ir import LANES

PART_LEN = 192  # tokens of context at a time: whole tiles of scores, which stay in the second cache

_TILE_TOKENS = 32  # new tokens of one unit of work
_LOWEST = np.float32(-1e30)


def _widened(number):
    """A number of the pool as float32: itself, or the bits of a bfloat16."""
    raise NotImplementedError


@overload(_widened)
def _overload_widened(number):
    if number == types.float32:
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _pack_part(pool, layer, table, head, first, context_len, keys, values):
    """The context's part at `first`: keys [tokens / LANES, dim, LANES], values [dim / LANES, tokens, LANES].

    Filled up to whole vectors with 0, which no score that counts will ever meet.
    """
    block_size = pool.shape[3]
    count = min(PART_LEN, context_len - first)
    for token in range(count):
        block, offset = table[(first + token) // block_size], (first + token) % block_size
        panel, lane = token // LANES, token % LANES
        for dim in range(pool.shape[5]):
            keys[panel, dim, lane] = _widened(pool[block, layer, 0, offset, head, dim])
            values[dim // LANES, token, dim % LANES] = _widened(pool[block, layer, 1, offset, head, dim])
    for token in range(count, (count + LANES - 1) // LANES * LANES):
        keys[token // LANES, :, token % LANES] = 0
        values[:, token] = 0


@numba.njit(cache=True, nogil=True)
def _scale(row, factor, out):
    for dim in range(row.shape[0]):
        out[dim] = row[dim] * factor


@numba.njit(cache=True, nogil=True)
def _attend(query, position, scale, keys, values, out):
    """`query` [tokens, group, dim], the first at `position`, to one KV head's parts of keys and values."""
    num_tokens, group_size, head_dim = query.shape
    num_rows = num_tokens * group_size
    queries = np.empty((num_rows, head_dim), np.float32)
    for token in range(num_tokens):
        for member in range(group_size):
            _scale(query[token, member], scale, queries[token * group_size + member])
    sums = np.zeros((num_rows, head_dim), np.float32)
    peaks, totals = np.full(num_rows, _LOWEST), np.zeros(num_rows, np.float32)
    scores = np.empty((num_rows, PART_LEN), np.float32)
    context_len = position + num_tokens
    for part in range((context_len + PART_LEN - 1) // PART_LEN):
        first = part * PART_LEN
        num_vectors = (min(PART_LEN, context_len - first) + LANES - 1) // LANES
        multiply(queries, keys[part], 0, num_vectors, head_dim, scores, False)
        for row in range(num_rows):
            visible = position + row // group_size + 1 - first
            for token in range(max(0, visible), num_vectors * LANES):
                scores[row, token] = _LOWEST
            peak, total = softmax_row(scores[row], num_vectors, peaks[row])
            if peak > peaks[row]:
                factor = np.exp(peaks[row] - peak)
                totals[row] *= factor
                _scale(sums[row], factor, sums[row])
                peaks[row] = peak
            totals[row] += total
        multiply(scores, values[part], 0, head_dim // LANES, num_vectors * LANES, sums, True)
    for token in range(num_tokens):
        for member in range(group_size):
            row = token * group_size + member
            _scale(sums[row], np.float32(1) / totals[row], out[token, member])


@numba.njit(cache=True, nogil=True, parallel=True)
def prefill(pool, layer, table, context_len, query, scale, keys, values, out):
    """Attention of the last T of `context_len` tokens -> `out` [T, heads, dim], as `query`, float32.

    `table` [blocks]; `scale` times each score. Scratch, float32, for parts = ceil(context_len / PART_LEN):
    `keys` [kv heads, parts, PART_LEN / LANES, dim, LANES] and
    `values` [kv heads, parts, dim / LANES, PART_LEN, LANES].
    """
    num_tokens, num_kv_heads, num_parts = query.shape[0], pool.shape[4], keys.shape[1]
    group_size = query.shape[1] // num_kv_heads
    for unit in numba.prange(num_kv_heads * num_parts):
        head, part = unit // num_parts, unit % num_parts
        first = part * PART_LEN
        _pack_part(pool, layer, table, head, first, context_len, keys[head, part], values[head, part])
    num_tiles = (num_tokens + _TILE_TOKENS - 1) // _TILE_TOKENS
    for unit in numba.prange(num_tiles * num_kv_heads):
        # Each thread gets a run of units. One head after the other: its keys and values stay in the second
        # cache. Tiles from both ends in turn: later tokens have more to attend to.
        head, place = unit // num_tiles, unit % num_tiles
        tile = num_tiles - 1 - place // 2 if place % 2 else place // 2
        start = tile * _TILE_TOKENS
        stop = min(num_tokens, start + _TILE_TOKENS)
        first, last = head * group_size, (head + 1) * group_size
        position = context_len - num_tokens + start
        _attend(
            query[start:stop, first:last],
            position,
            scale,
            keys[head],
            values[head],
            out[start:stop, first:last],
        )
