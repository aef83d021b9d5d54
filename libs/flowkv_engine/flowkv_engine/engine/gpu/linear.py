"""Linear layers of the GPU path: over floats by torch, over stored weights by a kernel that widens them.

A number is `scale * (code - zero)` or `scale * code + offset` in float32, then one of the type of the states,
as if it had been widened at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear

from flowkv_engine.engine.flat import Projection, fuse
from flowkv_engine.engine.gpu import kernels
from flowkv_engine.engine.stored import Form, Stored, groups_of
from flowkv_engine.engine.stored_modules import StoredLinear

# Rows of the states, columns of the result, and numbers of a row of the weight: of a program, per step.
FEW_ROWS, MANY_ROWS, TILE_COLS, TILE_LEN = 16, 64, 64, 128
_PIECE = 4096  # rows of a weight that go to the device at a time


class GroupedWeight(NamedTuple):
    """A stored weight [N, K] on a device: codes of 4 or 8 bits, and what each group of a row has.

    Each part in a tensor of its own, since blocks begin at addresses that threads can't read well. In codes
    of 4 bits [N, K / 2], 16 bytes hold the first 16 of 32 numbers in their low halves and the others in the
    high ones. Codes of 5 and 6 bits take 8, and scales of GGUF's super blocks 32.
    """

    form: Form
    codes: Tensor
    scales: Tensor  # [N, K / group]
    shifts: Tensor  # the same, or [N, 0]: offsets, or zeros

    def multiply(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """`states` [M, K], contiguous -> [M, N]."""
        num_rows, num_cols = len(states), len(self.codes)
        result = torch.empty(num_rows, num_cols, dtype=states.dtype, device=states.device)
        tile_rows = FEW_ROWS if num_rows <= FEW_ROWS else MANY_ROWS
        kernels.multiply_groups[(triton.cdiv(num_cols, TILE_COLS), triton.cdiv(num_rows, tile_rows))](
            states,
            self.codes,
            self.scales,
            self.shifts,
            states if bias is None else bias,
            result,
            num_rows,
            num_cols,
            **constants_of(self.form, states.shape[1], tile_rows),
            has_bias=bias is not None,
            num_stages=num_stages(states.element_size()),
        )
        return result


def num_stages(item_bytes: int) -> int:
    """Steps whose states and codes are loaded ahead: shared memory holds fewer of float32."""
    return 3 if item_bytes == 2 else 2


def constants_of(form: Form, length: int, tile_rows: int) -> dict[str, int]:
    """What `multiply_groups` is compiled for."""
    return {
        "length": length,
        "bits": 4 if form.bits == 4 else 8,
        "group": form.group,
        "zero": form.zero,
        "has_zeros": form.has_zeros,
        "has_offsets": form.has_offset,
        "is_e4m3": form.is_e4m3,
        "tile_rows": tile_rows,
        "tile_cols": TILE_COLS,
        "tile_len": TILE_LEN,
    }


def grouped(stored: Stored, device: torch.device) -> GroupedWeight:
    """Of any form but floats of 16 bits."""
    starts = range(0, stored.shape[0], _PIECE)
    pieces = [_to_device(stored.rows(slice(start, start + _PIECE)), device) for start in starts]
    return GroupedWeight(stored.form, *(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _to_device(stored: Stored, device: torch.device) -> list[Tensor]:
    """Codes, scales and shifts."""
    codes, scales, shifts, _ = groups_of(stored)
    if stored.form.bits == 4:
        halves = codes.reshape(len(codes), -1, 2, 16)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    return [torch.from_numpy(each.copy()).to(device) for each in (codes, scales, shifts)]


class _Part(NamedTuple):
    weight: Tensor | GroupedWeight
    bias: Tensor | None
    order: Tensor | None  # the input of each column of the weight, if they are not in order


class FusedLinear:
    """Projections of one input, side by side; neighbours of one form and order of inputs become one."""

    def __init__(self, projections: Sequence[Projection], device: torch.device) -> None:
        """Their own weights become views of the new one, or are forgotten if they are stored."""
        self._parts = [_part(list(group), device) for _, group in groupby(projections, _kind)]

    def __call__(self, states: Tensor) -> Tensor:
        """[M, K] -> [M, N]"""
        outs = [_multiply(part, states) for part in self._parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _multiply(part: _Part, states: Tensor) -> Tensor:
    if isinstance(part.weight, Tensor):
        return linear(states, part.weight, part.bias)
    if part.order is not None:
        states = states.index_select(1, part.order)
    return part.weight.multiply(states.contiguous(), part.bias)


def _kind(projection: Projection) -> tuple[Form, bytes, bool] | None:
    if isinstance(projection, nn.Linear):
        return None
    order = b"" if projection.order is None else projection.order.tobytes()
    return projection.stored.form, order, projection.bias is None


def _part(projections: Sequence[Projection], device: torch.device) -> _Part:
    stored = [each for each in projections if isinstance(each, StoredLinear)]
    if not stored:
        return _Part(*fuse(*projections), None)
    blocks = [each.stored.blocks for each in stored]
    weight = grouped(Stored(stored[0].stored.form, np.concatenate(blocks)), device)
    biases = [each.bias.detach() for each in stored if each.bias is not None]
    order = None if stored[0].order is None else torch.from_numpy(stored[0].order).to(device)
    for each in stored:
        each.release()
    return _Part(weight, torch.cat(biases) if biases else None, order)
