"""The compiled loops of CPU attention: storing keys and values, and flash decoding over a block table.

Compiled at first use and cached on disk (`NUMBA_CACHE_DIR`). Knows arrays only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import types
from numba.extending import overload

from flowkv_engine.engine.cpu.linear import multiply
from flowkv_engine.engine.cpu.simd import LANES, score_tile, softmax_row, value_tile

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"


@numba.njit(cache=True, nogil=True)
def write_slots(pool, layer, keys, values, slots):
    """`keys`, `values` [T, kv heads, dim] of the pool's dtype -> the pool, at `slots` [T]."""
    block_size = pool.shape[3]
    for token in range(slots.shape[0]):
        block, offset = slots[token] // block_size, slots[token] % block_size
        for head in range(pool.shape[4]):
            for dim in range(pool.shape[5]):
                pool[block, layer, 0, offset, head, dim] = keys[token, head, dim]
                pool[block, layer, 1, offset, head, dim] = values[token, head, dim]


def _stored(number, like):
    """`number` as a pool of `like`'s type holds it: itself, or rounded to the bits of a bfloat16."""
    raise NotImplementedError


@overload(_stored)
def _overload_stored(number, like):
    if like == types.float32:
        return lambda number, like: number

    def narrow(number, like):
        bits = np.float32(number).view(np.uint32)
        nearest_even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(0x7FC0) if np.isnan(number) else np.uint16(nearest_even)

    return narrow


@numba.njit(cache=True, nogil=True)
def _rotate(states, cos, sin, factor, out):
    """One head [dim] turned by `cos` and `sin` [dim], times `factor`. `out` may be `states`."""
    half = states.shape[0] // 2
    for dim in range(half):
        first, second = states[dim], states[dim + half]
        out[dim] = (first * cos[dim] - second * sin[dim]) * factor
        out[dim + half] = (second * cos[dim + half] + first * sin[dim + half]) * factor


@numba.njit(cache=True, nogil=True)
def _place(pool, layer, slot, states, cos, sin, norm, eps, scale, query):
    """One row of `rotate_and_write`."""
    num_heads, num_kv_heads = query.shape[0], pool.shape[4]
    for head in range(norm.shape[0]):  # none, or all heads of queries and keys
        total = np.float32(0)
        for dim in range(states.shape[1]):
            total += states[head, dim] * states[head, dim]
        factor = np.float32(1) / np.sqrt(total / np.float32(states.shape[1]) + eps)
        for dim in range(states.shape[1]):
            states[head, dim] *= factor * norm[head, dim]
    for head in range(num_heads):
        _rotate(states[head], cos, sin, scale, query[head])
    block, offset = slot // pool.shape[3], slot % pool.shape[3]
    for head in range(num_kv_heads):
        key, value = states[num_heads + head], states[num_heads + num_kv_heads + head]
        _rotate(key, cos, sin, np.float32(1), key)
        for dim in range(states.shape[1]):
            like = pool[block, layer, 0, offset, head, dim]
            pool[block, layer, 0, offset, head, dim] = _stored(key[dim], like)
            pool[block, layer, 1, offset, head, dim] = _stored(value[dim], like)


@numba.njit(cache=True, nogil=True, parallel=True)
def rotate_and_write(pool, layer, slots, qkv, positions, cos, sin, norm, eps, scale, query):
    """Rotates queries and keys of `qkv` [T, heads + 2 kv heads, dim] (which it spoils) to their positions.

    Keys and values go into the pool at `slots` [T], queries times `scale` into `query` [T, heads, dim].
    `cos`, `sin`: [max positions, dim]; `norm`: [0 or heads + kv heads, dim], each head's RMS norm before.
    """
    for row in numba.prange(qkv.shape[0]):
        position = positions[row]
        _place(pool, layer, slots[row], qkv[row], cos[position], sin[position], norm, eps, scale, query[row])


@numba.njit(cache=True, nogil=True)
def _merge(parts, peaks, totals, out):
    """Parts [splits, heads, dim] with their maxima and sums [splits, heads] -> out [heads, dim]."""
    for head in range(out.shape[0]):
        highest, total = peaks[0, head], np.float32(0)
        for split in range(1, peaks.shape[0]):
            highest = max(highest, peaks[split, head])
        out[head] = 0
        for split in range(peaks.shape[0]):
            weight = np.exp(peaks[split, head] - highest)
            total += weight * totals[split, head]
            for dim in range(out.shape[1]):
                out[head, dim] += weight * parts[split, head, dim]
        for dim in range(out.shape[1]):
            out[head, dim] /= total


@numba.njit(cache=True, nogil=True)
def _after(pool, layer, table, first, start, stop):
    """What is read after the keys of the block of token `first`: the next block's, or the first values."""
    block_size = pool.shape[3]
    if first + block_size < stop:
        return pool[table[first // block_size + 1], layer, 0]
    return pool[table[start // block_size], layer, 1]


@numba.njit(cache=True, nogil=True, inline="always")
def _attend(pool, layer, query, table, start, stop, head, part, peaks, totals, group_size, head_dim):
    """KV head `head` over tokens `start .. stop - 1`: all scores, their softmax, then the values."""
    block_size = pool.shape[3]
    num_vectors = (stop - start + LANES - 1) // LANES
    scores = np.empty((group_size, (num_vectors + 1) * LANES), np.float32)  # a tile may reach beyond
    for first in range(start, stop, block_size):
        keys = pool[table[first // block_size], layer, 0]
        ahead = _after(pool, layer, table, first, start, stop)
        length = min(block_size, stop - first)
        for token in range(0, length, LANES):
            place = first - start + token
            score_tile(query, keys, ahead, token, head, length - token, scores, place, group_size, head_dim)
    scores[:, stop - start :] = -1e30
    for group in range(group_size):
        peaks[group], totals[group] = softmax_row(scores[group], num_vectors, np.float32(-1e30))
    part[:] = 0
    for first in range(start, stop, block_size):
        values = pool[table[first // block_size], layer, 1]
        ahead = pool[table[min(first + block_size, stop - 1) // block_size], layer, 1]
        length = min(block_size, stop - first)
        value_tile(scores, first - start, values, ahead, head, length, part, group_size, head_dim)


@functools.cache
def make_decode(group_size: int, head_dim: int) -> Callable[..., None]:
    """The decode kernel for `group_size` query heads per KV head; both sizes are compiled in.

    `decode(pool, layer, split_len, query, tables, context_lens, parts, peaks, totals, out)`: `query` (scaled)
    and `out` [N, heads, dim] float32; scratch: `parts` [N, splits, heads, dim], `peaks` and `totals`
    [N, splits, heads], float32. `split_len`: tokens per unit of work, a multiple of the block size.
    `head_dim`: a multiple of `LANES`.
    """

    @numba.njit(cache=True, nogil=True, parallel=True)
    def decode(pool, layer, split_len, query, tables, context_lens, parts, peaks, totals, out):
        num_rows, num_splits, num_kv_heads = query.shape[0], parts.shape[1], pool.shape[4]
        for unit in numba.prange(num_rows * num_splits * num_kv_heads):
            row, rest = unit // (num_splits * num_kv_heads), unit % (num_splits * num_kv_heads)
            split, head = rest // num_kv_heads, rest % num_kv_heads
            start = split * split_len
            stop = min(start + split_len, context_lens[row])
            first, last = head * group_size, (head + 1) * group_size
            if start < stop:
                _attend(
                    pool,
                    layer,
                    query[row, first:last],
                    tables[row],
                    start,
                    stop,
                    head,
                    parts[row, split, first:last],
                    peaks[row, split, first:last],
                    totals[row, split, first:last],
                    group_size,
                    head_dim,
                )
        for row in range(num_rows):
            used = (context_lens[row] + split_len - 1) // split_len
            _merge(parts[row, :used], peaks[row, :used], totals[row, :used], out[row])

    kernel: Callable[..., None] = decode
    return kernel


# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"


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
def _attend_prompt(query, position, scale, keys, values, out):
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
        _attend_prompt(
            query[start:stop, first:last],
            position,
            scale,
            keys[head],
            values[head],
            out[start:stop, first:last],
        )
