"""Compiled linear layers for few rows, where BLAS reads weights far below the speed of memory.

Each weight is read once, for all rows. A row's sums are in the same order in any batch. Compiled at first use
and cached on disk (`NUMBA_CACHE_DIR`). Knows arrays only.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import numba
import numpy as np

from flowkv_common.engine.simd import TILE_COLS, TILE_ROWS, dot_tile, gate_row
from flowkv_common.engine.vector_ir import LANES

# Columns that one thread takes at a time: a whole number of tiles and of vectors.
_UNIT = LANES * TILE_COLS


@numba.njit(cache=True, nogil=True)
def _tiles(x, w, col, out, adds):
    """All rows of `TILE_COLS` columns."""
    row, left = 0, x.shape[0]
    while left >= TILE_ROWS:
        dot_tile(x, row, w, col, out, adds, TILE_ROWS, TILE_COLS)
        row, left = row + TILE_ROWS, left - TILE_ROWS
    if left == 1:
        dot_tile(x, row, w, col, out, adds, 1, TILE_COLS)
    elif left == 2:
        dot_tile(x, row, w, col, out, adds, 2, TILE_COLS)
    elif left == 3:
        dot_tile(x, row, w, col, out, adds, 3, TILE_COLS)


@numba.njit(cache=True, nogil=True)
def _columns(x, w, bias, start, stop, out, adds):
    """Columns `start .. stop - 1` of `x @ w.T + bias`."""
    col = start
    while col + TILE_COLS <= stop:
        _tiles(x, w, col, out, adds)
        col += TILE_COLS
    while col < stop:
        for row in range(x.shape[0]):
            dot_tile(x, row, w, col, out, adds, 1, 1)
        col += 1
    if bias.shape[0]:
        for row in range(x.shape[0]):
            for col in range(start, stop):
                out[row, col] += bias[col]


@numba.njit(cache=True, nogil=True, parallel=True)
def linear(x, w, bias, out, adds):
    """`out [M, N] = x [M, K] @ w [N, K].T + bias [N or 0]`, or `+=` if `adds`. K: a multiple of `LANES`."""
    num_cols = w.shape[0]
    for unit in numba.prange((num_cols + _UNIT - 1) // _UNIT):
        _columns(x, w, bias, unit * _UNIT, min(num_cols, (unit + 1) * _UNIT), out, adds)


@numba.njit(cache=True, nogil=True, parallel=True)
def gated_linear(x, w, bias, scratch, out):
    """`out [M, N] = silu(gate) * up`, both halves of `x [M, K] @ w [2 N, K].T`; `scratch` [M, 2 N].

    N: a multiple of `LANES`.
    """
    num_cols = w.shape[0] // 2
    for unit in numba.prange((num_cols + _UNIT - 1) // _UNIT):
        start, stop = unit * _UNIT, min(num_cols, (unit + 1) * _UNIT)
        _columns(x, w, bias, start, stop, scratch, False)
        _columns(x, w, bias, num_cols + start, num_cols + stop, scratch, False)
        for row in range(x.shape[0]):
            gates = scratch[row, start:stop]
            gate_row(gates, scratch[row, num_cols + start : num_cols + stop], (stop - start) // LANES)
            out[row, start:stop] = gates


@numba.njit(cache=True, nogil=True, parallel=True)
def gate(gate_up):
    """`silu(gate) * up` of the halves of `gate_up` [M, 2 N], in its first half. N: a multiple of `LANES`."""
    num_cols = gate_up.shape[1] // 2
    for row in numba.prange(gate_up.shape[0]):
        gate_row(gate_up[row, :num_cols], gate_up[row, num_cols:], num_cols // LANES)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def rms_norm(x, weight, eps, out):
    """`out [M, K] = x * weight [K] / root mean square of x`."""
    for row in range(x.shape[0]):
        total = np.float32(0)
        for col in range(x.shape[1]):
            total += x[row, col] * x[row, col]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for col in range(x.shape[1]):
            out[row, col] = x[row, col] * scale * weight[col]
