"""Compiled linear layers over packed weights, and the norms and gates between them.

Decode reads each weight once for all rows, at the speed of memory; a prompt's many rows run at the rate of a
large matmul. Both use the same tiles, which sum a row in one order: it gets the same bits in any batch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from flowkv_engine.engine.cpu.panels import form_of, panel_tile, widen_panel
from flowkv_engine.engine.cpu.simd import LANES, TILE_PANELS, TILE_ROWS, gate_row

_HALF, _QUARTER = TILE_ROWS // 2, TILE_ROWS // 4
_BLOCK_ROWS = 256  # at most: a block stays in the second cache, and threads share the blocks
_SERIAL_ROWS = 32  # up to this many, waking other threads takes longer than the norms


def pack(*weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights [N_i, K] of one input, side by side -> panels [ceil(sum N_i / LANES), K, LANES].

    A panel holds `LANES` columns of the output: one vector of it is one step of K. The last is padded with 0.
    """
    num_cols, length = sum(len(weight) for weight in weights), weights[0].shape[1]
    panels = np.zeros((-(-num_cols // LANES), length, LANES), np.float32)
    first = 0
    for weight in weights:
        _pack(weight, first, panels)
        first += len(weight)
    return panels


@numba.njit(cache=True, nogil=True, parallel=True)
def _pack(weight, first, panels):
    for row in numba.prange(weight.shape[0]):
        col = first + row
        panels[col // LANES, :, col % LANES] = weight[row]


def _make_tiles(num_panels):
    @numba.njit(cache=True, nogil=True)
    def few(x, row, panels, panel, length, out, adds):
        left = x.shape[0] - row
        if left >= _HALF:
            panel_tile(x, row, panels, panel, length, out, adds, _HALF, num_panels)
            row, left = row + _HALF, left - _HALF
        if left >= _QUARTER:
            panel_tile(x, row, panels, panel, length, out, adds, _QUARTER, num_panels)
            row, left = row + _QUARTER, left - _QUARTER
        if left:
            panel_tile(x, row, panels, panel, length, out, adds, 1, num_panels)

    return few


# Less than `TILE_ROWS` rows, from `row` to the last, of several panels, of two, and of one.
_few_rows, _few_rows_of_two, _few_rows_of_one = _make_tiles(TILE_PANELS), _make_tiles(2), _make_tiles(1)


@numba.njit(cache=True, nogil=True)
def multiply(x, panels, start, stop, length, out, adds):
    """Panels `start .. stop - 1` of `linear`, in float32, by the first `length` of K; on this thread.

    Of four that are left two and two: one alone waits for its sums, not for the processor.
    """
    full = x.shape[0] // TILE_ROWS * TILE_ROWS
    panel = start
    while stop - panel == TILE_PANELS or stop - panel > TILE_PANELS + 1:
        for row in range(0, full, TILE_ROWS):
            panel_tile(x, row, panels, panel, length, out, adds, TILE_ROWS, TILE_PANELS)
        _few_rows(x, full, panels, panel, length, out, adds)
        panel += TILE_PANELS
    while stop - panel >= 2:
        for row in range(0, full, TILE_ROWS):
            panel_tile(x, row, panels, panel, length, out, adds, TILE_ROWS, 2)
        _few_rows_of_two(x, full, panels, panel, length, out, adds)
        panel += 2
    if stop - panel:
        for row in range(0, full, TILE_ROWS):
            panel_tile(x, row, panels, panel, length, out, adds, TILE_ROWS, 1)
        _few_rows_of_one(x, full, panels, panel, length, out, adds)


def _products(x, panels, start, stop, out, adds):
    """As `multiply`, by panels of any form: up to `TILE_PANELS` of them."""
    raise NotImplementedError


@overload(_products)
def _products_of(x, panels, start, stop, out, adds):
    if form_of(panels) is None:
        return lambda x, panels, start, stop, out, adds: multiply(
            x, panels, start, stop, x.shape[1], out, adds
        )

    def widening(x, panels, start, stop, out, adds):
        if x.shape[0] < TILE_ROWS and stop - start == TILE_PANELS:
            _few_rows(x, 0, panels, start, x.shape[1], out, adds)
            return
        # Widened once for all rows: they stay in the second cache.
        wide = np.empty((TILE_PANELS, x.shape[1], LANES), np.float32)
        for panel in range(start, stop):
            widen_panel(panels, panel, wide, panel - start)
        columns = out[:, start * LANES : stop * LANES]
        multiply(x, wide, 0, stop - start, x.shape[1], columns, adds)

    return widening


@numba.njit(cache=True, nogil=True)
def linear_columns(x, panels, bias, start, stop, out, adds):
    """Panels `start .. stop - 1` of `linear`, up to `TILE_PANELS`; on this thread."""
    _products(x, panels, start, stop, out, adds)
    if bias.shape[0]:
        for row in range(x.shape[0]):
            for col in range(start * LANES, stop * LANES):
                out[row, col] += bias[col]


@numba.njit(cache=True, nogil=True)
def row_blocks(num_rows):
    """The number of blocks of so many rows, and their length: about equal, so threads get equal work."""
    num_blocks = (num_rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS
    length = (num_rows + num_blocks - 1) // num_blocks if num_blocks else 0
    return num_blocks, (length + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@numba.njit(cache=True, nogil=True, parallel=True)
def linear(x, panels, bias, out, adds):
    """`out [M, N] = x [M, K] @ weight.T + bias [N or 0]`, or `+=` if `adds`.

    `panels`: the weight, packed, in any form.
    """
    num_panels = panels.shape[0]
    num_blocks, length = row_blocks(x.shape[0])
    for unit in numba.prange(num_blocks * ((num_panels + TILE_PANELS - 1) // TILE_PANELS)):
        row, start = unit % num_blocks * length, unit // num_blocks * TILE_PANELS
        rows = slice(row, row + length)
        linear_columns(x[rows], panels, bias, start, min(num_panels, start + TILE_PANELS), out[rows], adds)


@numba.njit(cache=True, nogil=True, parallel=True)
def gated_linear(x, gates, gate_bias, ups, up_bias, activation, scratch, out):
    """`out [M, N] =` the activation of gate and up, each as `linear` gives it; `scratch` [M, N].

    `activation`: the numbers of an `Activation`, in float32.
    """
    num_panels = gates.shape[0]
    num_blocks, length = row_blocks(x.shape[0])
    for unit in numba.prange(num_blocks * ((num_panels + TILE_PANELS - 1) // TILE_PANELS)):
        row, start = unit % num_blocks * length, unit // num_blocks * TILE_PANELS
        stop = min(num_panels, start + TILE_PANELS)
        rows = slice(row, row + length)
        linear_columns(x[rows], gates, gate_bias, start, stop, out[rows], False)
        linear_columns(x[rows], ups, up_bias, start, stop, scratch[rows], False)
        for each in range(row, min(x.shape[0], row + length)):
            first, last = start * LANES, stop * LANES
            gate_row(out[each, first:last], scratch[each, first:last], stop - start, activation)


@numba.njit(cache=True, nogil=True, parallel=True)
def unpack_rows(panels, rows, out):
    """`out [T, K] =` those rows of the weight [N, K] that is packed in `panels`, of a stored form."""
    for i in numba.prange(len(rows)):
        wide = np.empty((1, out.shape[1], LANES), np.float32)
        widen_panel(panels, rows[i] // LANES, wide, 0)
        for k in range(out.shape[1]):  # a slice takes two seconds more to compile
            out[i, k] = wide[0, k, rows[i] % LANES]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _normalize(row, weight, eps, out, adds):
    total = np.float32(0)
    for col in range(row.shape[0]):
        total += row[col] * row[col]
    scale = np.float32(1) / np.sqrt(total / np.float32(row.shape[0]) + eps)
    if adds:
        for col in range(row.shape[0]):
            out[col] += row[col] * scale * weight[col]
    else:
        for col in range(row.shape[0]):
            out[col] = row[col] * scale * weight[col]


@numba.njit(cache=True, nogil=True, parallel=True)
def rms_norm(x, weight, eps, out, adds):
    """`out [M, K] = x * weight [K] / root mean square of x`, or `+=` if `adds`."""
    if x.shape[0] <= _SERIAL_ROWS:
        for row in range(x.shape[0]):
            _normalize(x[row], weight, eps, out[row], adds)
    else:
        for row in numba.prange(x.shape[0]):
            _normalize(x[row], weight, eps, out[row], adds)
