"""The compiled loops of CPU attention: storing keys and values, and flash decoding over a block table.

Compiled at first use and cached on disk (`NUMBA_CACHE_DIR`). Knows arrays only.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

# Lets sums be reordered, and so vectorized. Not `nnan`: a NaN has to come out as one.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


@intrinsic
def _widen(context: Any, number: Any) -> Any:
    """A float32 as it is; the 16 bits of a bfloat16 as the float32 whose upper half they are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), generate


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


@numba.njit(cache=True, nogil=True, fastmath=FASTMATH)
def _exponentials(scores, length, peak, total, sums):
    """Turns `scores` into exponentials under the new running maximum; rescales what was summed so far."""
    for group in range(scores.shape[0]):
        highest = peak[group]
        for offset in range(length):
            highest = max(highest, scores[group, offset])
        shrink = np.exp(peak[group] - highest)
        peak[group] = highest
        total[group] *= shrink
        sums[group] *= shrink
        for offset in range(length):
            scores[group, offset] = np.exp(scores[group, offset] - highest)
            total[group] += scores[group, offset]


@numba.njit(cache=True, nogil=True, fastmath=FASTMATH, inline="always")
def _attend(pool, layer, query, table, start, stop, head, part, peak, total, group_size, head_dim):
    """KV head `head` over tokens `start .. stop - 1`, block by block with a running softmax."""
    block_size = pool.shape[3]
    scores = np.empty((group_size, block_size), np.float32)
    part[:] = 0
    total[:] = 0
    peak[:] = -1e30
    for block_start in range(start, stop, block_size):
        keys = pool[table[block_start // block_size], layer, 0]
        values = pool[table[block_start // block_size], layer, 1]
        length = min(block_size, stop - block_start)
        for offset in range(length):
            for group in range(group_size):
                score = np.float32(0)
                for dim in range(head_dim):
                    score += query[group, dim] * _widen(keys[offset, head, dim])
                scores[group, offset] = score
        _exponentials(scores, length, peak, total, part)
        for group in range(group_size):
            for offset in range(length):
                weight = scores[group, offset]
                for dim in range(head_dim):
                    part[group, dim] += weight * _widen(values[offset, head, dim])


@numba.njit(cache=True, nogil=True)
def _merge(parts, peaks, totals, out):
    """Parts [splits, heads, dim] with their maxima and sums [splits, heads] -> out [heads, dim]."""
    for head in range(out.shape[0]):
        weights = np.exp(peaks[:, head] - peaks[:, head].max())
        out[head] = 0
        for split in range(len(weights)):
            out[head] += weights[split] * parts[split, head]
        out[head] /= (weights * totals[:, head]).sum()


@functools.cache
def make_decode(group_size: int, head_dim: int) -> Callable[..., None]:
    """The decode kernel for `group_size` query heads per KV head; both sizes are compiled in.

    `decode(pool, layer, split_len, query, tables, context_lens, parts, peaks, totals, out)`: `query` (scaled)
    and `out` [N, heads, dim] float32; scratch: `parts` [N, splits, heads, dim], `peaks` and `totals`
    [N, splits, heads], float32. `split_len`: tokens per unit of work, a multiple of the block size.
    """

    @numba.njit(cache=True, nogil=True, parallel=True, fastmath=FASTMATH)
    def decode(pool, layer, split_len, query, tables, context_lens, parts, peaks, totals, out):
        num_rows, num_splits, num_kv_heads = len(query), parts.shape[1], pool.shape[4]
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
