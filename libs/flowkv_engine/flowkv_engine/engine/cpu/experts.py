"""A mixture of experts on the CPU: routing, and products of rows with the weights of their experts.

Rows are sorted by expert, and each expert multiplies its own in one go: it reads its weights once. The tiles
are those of `linear`, which sum a row in one order, and a row adds up its experts from the best to the last:
it gets the same bits in any batch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import numba
import numpy as np

from flowkv_engine.engine.cpu.linear import linear_columns, row_blocks
from flowkv_engine.engine.cpu.simd import LANES, TILE_PANELS, gate_row

_SERIAL_ROWS = 32  # up to this many, waking other threads takes longer than the choice


@numba.njit(cache=True, nogil=True)
def _choose(logits, is_sigmoid, correction, num_groups, num_kept_groups, normalizes, scale, ids, weights):
    """As `route`, of one row; of `logits` only those of experts."""
    num_experts = logits.shape[0]
    scores, keys = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    if is_sigmoid:
        for expert in range(num_experts):
            scores[expert] = np.float32(1) / (np.float32(1) + np.exp(-logits[expert]))
    else:
        highest, total = logits.max(), np.float32(0)
        for expert in range(num_experts):
            scores[expert] = np.exp(logits[expert] - highest)
            total += scores[expert]
        for expert in range(num_experts):
            scores[expert] /= total
    for expert in range(num_experts):
        keys[expert] = scores[expert] + (correction[expert] if correction.shape[0] else np.float32(0))
    if num_kept_groups < num_groups:  # a group counts as its two best experts
        size = num_experts // num_groups
        of_groups = np.empty(num_groups, np.float32)
        for group in range(num_groups):
            first = second = np.float32(-np.inf)
            for expert in range(group * size, (group + 1) * size):
                second = max(second, min(first, keys[expert]))
                first = max(first, keys[expert])
            of_groups[group] = first + second
        for _ in range(num_groups - num_kept_groups):
            worst = np.argmin(of_groups)
            of_groups[worst] = np.inf
            keys[worst * size : (worst + 1) * size] = -np.inf
    total = np.float32(0)
    for place in range(ids.shape[0]):
        best = np.argmax(keys)
        keys[best] = -np.inf
        ids[place], weights[place] = best, scores[best]
        total += scores[best]
    factor = np.float32(scale)
    if normalizes:
        factor /= total + np.float32(1e-20)
    for place in range(ids.shape[0]):
        weights[place] *= factor


@numba.njit(cache=True, nogil=True, parallel=True)
def route(
    logits, num_experts, is_sigmoid, correction, num_groups, num_kept_groups, normalizes, scale, ids, weights
):
    """The experts of each row of `logits` [T, experts and padding] to `ids` and `weights` [T, top k].

    The arguments between are those of a `Router`; `correction` [0 or experts].
    """
    if logits.shape[0] <= _SERIAL_ROWS:
        for row in range(logits.shape[0]):
            _choose(
                logits[row, :num_experts],
                is_sigmoid,
                correction,
                num_groups,
                num_kept_groups,
                normalizes,
                scale,
                ids[row],
                weights[row],
            )
    else:
        for row in numba.prange(logits.shape[0]):
            _choose(
                logits[row, :num_experts],
                is_sigmoid,
                correction,
                num_groups,
                num_kept_groups,
                normalizes,
                scale,
                ids[row],
                weights[row],
            )


@numba.njit(cache=True, nogil=True)
def sort_by_expert(ids, num_experts):
    """Places for the pairs of row and expert in `ids` [T, top k], expert after expert.

    Returns the row of each place [T * top k], the place of each pair [T, top k], and blocks of places of one
    expert [blocks, 3]: the expert, the first place, the one behind the last.
    """
    counts = np.zeros(num_experts + 1, np.int64)
    for expert in ids.flat:
        counts[expert + 1] += 1
    num_blocks = 0
    for expert in range(num_experts):
        num_blocks += row_blocks(counts[expert + 1])[0]
    firsts = np.cumsum(counts)
    blocks = np.empty((num_blocks, 3), np.int64)
    block = 0
    for expert in range(num_experts):
        num_own, length = row_blocks(counts[expert + 1])
        for number in range(num_own):
            first = firsts[expert] + number * length
            blocks[block] = expert, first, min(first + length, firsts[expert + 1])
            block += 1
    rows, places = np.empty(ids.size, np.int64), np.empty(ids.shape, np.int64)
    for row in range(ids.shape[0]):
        for choice in range(ids.shape[1]):
            expert = ids[row, choice]
            places[row, choice] = firsts[expert]
            rows[firsts[expert]] = row
            firsts[expert] += 1
    return rows, places, blocks


@numba.njit(cache=True, nogil=True, parallel=True)
def take_rows(x, rows, out):
    """`out [S, K] = x[rows]`."""
    for place in numba.prange(rows.shape[0]):
        out[place] = x[rows[place]]


@numba.njit(cache=True, nogil=True, parallel=True)
def experts_linear(x, blocks, panels, bias, out):
    """`out [S, N] = x [S, K] @ weight.T + bias` of the expert of each place.

    `panels` [experts, ...]: the weights, packed, in any form; `bias` [experts, N or 0].
    """
    num_panels, num_blocks = panels.shape[1], blocks.shape[0]
    for unit in numba.prange(num_blocks * ((num_panels + TILE_PANELS - 1) // TILE_PANELS)):
        # Threads get units one after the other: each some columns of all experts, so about equal work.
        block, start = unit % num_blocks, unit // num_blocks * TILE_PANELS
        expert, first, last = blocks[block, 0], blocks[block, 1], blocks[block, 2]
        stop = min(num_panels, start + TILE_PANELS)
        linear_columns(x[first:last], panels[expert], bias[expert], start, stop, out[first:last], False)


@numba.njit(cache=True, nogil=True, parallel=True)
def experts_gated_linear(x, blocks, gates, gate_bias, ups, up_bias, activation, scratch, out):
    """`out [S, N] =` the activation of gate and up, each as `experts_linear` gives it; `scratch` [S, N]."""
    num_panels, num_blocks = gates.shape[1], blocks.shape[0]
    for unit in numba.prange(num_blocks * ((num_panels + TILE_PANELS - 1) // TILE_PANELS)):
        block, start = unit % num_blocks, unit // num_blocks * TILE_PANELS
        expert, first, last = blocks[block, 0], blocks[block, 1], blocks[block, 2]
        stop = min(num_panels, start + TILE_PANELS)
        rows = x[first:last]
        linear_columns(rows, gates[expert], gate_bias[expert], start, stop, out[first:last], False)
        linear_columns(rows, ups[expert], up_bias[expert], start, stop, scratch[first:last], False)
        for each in range(first, last):
            columns = slice(start * LANES, stop * LANES)
            gate_row(out[each, columns], scratch[each, columns], stop - start, activation)


@numba.njit(cache=True, nogil=True, parallel=True)
def add_weighted(x, places, weights, out):
    """`out [T, N] += weights [T, top k]` times the rows of `x [S, N]` at `places` [T, top k]."""
    for row in numba.prange(places.shape[0]):
        for choice in range(places.shape[1]):
            place, weight = places[row, choice], weights[row, choice]
            for col in range(out.shape[1]):
                out[row, col] += weight * x[place, col]
