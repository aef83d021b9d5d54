"""Weights as files store them: fewer bits than they are computed with, and how each becomes a float32.

A matrix [N, K] keeps its form until a kernel widens it in registers, so memory holds and moves what the file
holds. What the kernels compute with is exactly what `widened` gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

SUPER_GROUP = 256  # numbers of a row that share a float16 pair, in forms whose scales are integers


class Form(NamedTuple):
    """How a number is stored. Codes of 16 bits are floats, others mean `scale * (code - zero) + offset`.

    Each `group` of a row's numbers has a scale, and an offset if `has_offset`: float16, or `has_supers`:
    integers of 8 bits times a float16 for each `SUPER_GROUP`; the offset is subtracted then. With
    `has_full_scales` the scale is a float32, beside it a zero of the group's own, unless codes are floats.
    """

    name: str
    bits: int  # of a code: 4, 5, 6 (unsigned), 8 (signed), 16
    group: int = 32
    zero: int = 0
    has_offset: bool = False
    has_supers: bool = False
    has_full_scales: bool = False
    is_e4m3: bool = False  # codes are floats of 8 bits: 4 of exponent, 3 of mantissa, no infinity

    @property
    def has_zeros(self) -> bool:
        return self.has_full_scales and not self.is_e4m3


FLOAT16, BFLOAT16 = Form("F16", 16), Form("BF16", 16)
Q4_0, Q4_1 = Form("Q4_0", 4, zero=8), Form("Q4_1", 4, has_offset=True)
Q5_0, Q5_1 = Form("Q5_0", 5, zero=16), Form("Q5_1", 5, has_offset=True)
Q8_0 = Form("Q8_0", 8)
Q4_K = Form("Q4_K", 4, has_offset=True, has_supers=True)
Q5_K = Form("Q5_K", 5, has_offset=True, has_supers=True)
Q6_K = Form("Q6_K", 6, group=16, zero=32, has_supers=True)

# Kernels know a form by its name.
FORMS = (FLOAT16, BFLOAT16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)

# What the formats of quantized safetensors become (`quantized.py`): the same numbers in rows of groups.
INT4_32 = Form("INT4_32", 4, 32, has_full_scales=True)
INT4_128 = Form("INT4_128", 4, 128, has_full_scales=True)
INT8_32 = Form("INT8_32", 8, 32, has_full_scales=True)
INT8_128 = Form("INT8_128", 8, 128, has_full_scales=True)
E4M3_32 = Form("E4M3_32", 8, 32, has_full_scales=True, is_e4m3=True)
E4M3_128 = Form("E4M3_128", 8, 128, has_full_scales=True, is_e4m3=True)
GROUPED_FORMS = (INT4_32, INT4_128, INT8_32, INT8_128, E4M3_32, E4M3_128)

_SUPER_BYTES = {Q4_K: 144, Q5_K: 176, Q6_K: 210}  # of a block of 256 in a file
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # by code


def _file_block(form: Form) -> tuple[int, int]:
    """Numbers and bytes of a block in a file."""
    if form.bits == 16:
        return 1, 2
    if form.has_supers:
        return SUPER_GROUP, _SUPER_BYTES[form]
    if form.has_full_scales:
        return form.group, _head_bytes(form) + form.group * form.bits // 8
    return 32, 2 * (1 + form.has_offset) + 4 * form.bits


def _head_bytes(form: Form) -> int:
    """Of a group with a full scale, before its codes."""
    return 4 + 2 * form.has_zeros


class Stored(NamedTuple):
    """A matrix [N, K] as in a file: `blocks` [N, bytes of a row], uint8.

    ggml-common.h says which bit is what. Rows of floats of 16 bits are those floats. Each group with a full
    scale is that scale, its zero, its codes; of two codes in a byte the low one is the first.
    """

    form: Form
    blocks: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_bytes = self.blocks.shape
        length, size = _file_block(self.form)
        return num_rows, num_bytes // size * length

    def rows(self, rows: NDArray[np.int64] | slice) -> Stored:
        return Stored(self.form, self.blocks[rows])


class Parts(NamedTuple):
    """What the blocks of a matrix [N, K] consist of.

    `codes` [N, K]: uint8, int8 for integers of 8 bits, the bits as uint16 for floats of 16. `scales`
    [N, K / group] and `offsets`, of that shape or [N, 0]: float16, or with supers uint8 (int8 for `Q6_K`);
    full scales are float32, and their groups' zeros stand for the offsets. `supers` [N, K / 256, 1 or 2] or
    [N, 0, 0], float16: of the scales, and of the offsets if there are any.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    offsets: NDArray[Any]
    supers: NDArray[np.float16]


def widened(stored: Stored) -> NDArray[np.float32]:
    """All numbers as float32 [N, K]: what GGUF's own reader gives for them, bit for bit."""
    form = stored.form
    codes, scales, offsets, _ = groups_of(stored)
    if form is FLOAT16:
        return codes.view(np.float16).astype(np.float32)
    if form is BFLOAT16:
        bits = codes.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if form.has_full_scales:
        return _widened_groups(form, codes, scales, offsets)
    numbers = codes.reshape(*scales.shape, form.group).astype(np.float32)
    if form.zero:
        numbers -= form.zero
    numbers *= scales.astype(np.float32)[..., None]
    if form.has_offset:
        numbers += offsets.astype(np.float32)[..., None]
    return numbers.reshape(codes.shape)


def _widened_groups(
    form: Form, codes: NDArray[Any], scales: NDArray[np.float32], zeros: NDArray[np.float16]
) -> NDArray[np.float32]:
    groups = codes.reshape(*scales.shape, form.group)
    numbers = _E4M3[groups] if form.is_e4m3 else groups.astype(np.float32)
    if form.has_zeros:
        numbers -= zeros.astype(np.float32)[..., None]
    numbers *= scales[..., None]
    return numbers.reshape(codes.shape)


def stored_groups(
    form: Form, codes: NDArray[Any], scales: NDArray[np.float32], zeros: NDArray[np.float16] | None
) -> Stored:
    """The matrix that consists of these (see `Parts`), of a form with full scales."""
    num_rows, num_groups = scales.shape
    head = _head_bytes(form)
    blocks = np.empty((num_rows, num_groups, _file_block(form)[1]), np.uint8)
    blocks[..., :4] = scales[..., None].view(np.uint8)
    if zeros is not None:
        blocks[..., 4:head] = zeros[..., None].view(np.uint8)
    codes = codes.view(np.uint8).reshape(num_rows, num_groups, form.group)
    blocks[..., head:] = codes[..., ::2] | codes[..., 1::2] << 4 if form.bits == 4 else codes
    return Stored(form, blocks.reshape(num_rows, -1))


def _read_groups(form: Form, rows: NDArray[np.uint8]) -> Parts:
    num_rows, head = len(rows), _head_bytes(form)
    blocks = rows.reshape(num_rows, -1, _file_block(form)[1])
    scales = np.ascontiguousarray(blocks[..., :4]).view(np.float32)[..., 0]
    zeros = np.empty((num_rows, 0), np.float16)
    if form.has_zeros:
        zeros = np.ascontiguousarray(blocks[..., 4:head]).view(np.float16)[..., 0]
    codes: NDArray[Any] = blocks[..., head:]
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    elif form.has_zeros:
        codes = codes.view(np.int8)
    return Parts(codes.reshape(num_rows, -1), scales, zeros, _none(num_rows))


def parts_of(stored: Stored) -> Parts:
    form, blocks = stored
    if form.bits == 16:
        none = np.empty((len(blocks), 0), np.float16)
        return Parts(np.ascontiguousarray(blocks).view(np.uint16), none, none, _none(len(blocks)))
    if form.has_full_scales:
        return _read_groups(form, blocks)
    return (_read_supers if form.has_supers else _read_plain)(form, blocks)


def groups_of(stored: Stored) -> Parts:
    """As `parts_of`, without supers: they are in scales and in offsets to be added, both float32 then."""
    form, (codes, scales, offsets, supers) = stored.form, parts_of(stored)
    if form.has_supers:
        wide = np.repeat(supers.astype(np.float32), SUPER_GROUP // form.group, axis=1)
        scales = scales.astype(np.float32) * wide[..., 0]
        offsets = -offsets.astype(np.float32) * wide[..., 1] if form.has_offset else offsets
    return Parts(codes, scales, offsets, _none(len(codes)))


def _none(num_rows: int) -> NDArray[np.float16]:
    return np.empty((num_rows, 0, 0), np.float16)


def _read_plain(form: Form, rows: NDArray[np.uint8]) -> Parts:
    """Blocks of 32: scale, offset if there is one, high bits of 5, codes."""
    num_rows = len(rows)
    high_bytes = 4 if form.bits == 5 else 0
    head = 4 if form.has_offset else 2
    blocks = rows.reshape(num_rows, -1, head + high_bytes + 4 * min(form.bits & ~1, 8))
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    offsets = np.empty((num_rows, 0), np.float16)
    if form.has_offset:
        offsets = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
    codes: NDArray[Any] = blocks[..., head + high_bytes :]
    if form is Q8_0:
        codes = codes.view(np.int8)
    else:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)  # first the low halves of all bytes
        if high_bytes:
            bits = np.unpackbits(blocks[..., head : head + high_bytes], axis=-1, bitorder="little")
            codes |= bits << 4
    return Parts(codes.reshape(num_rows, -1), scales, offsets, _none(num_rows))


def _read_supers(form: Form, rows: NDArray[np.uint8]) -> Parts:
    """Blocks of 256."""
    num_rows = len(rows)
    if form is Q6_K:  # low halves, high bits, scales, super scale
        blocks = rows.reshape(num_rows, -1, 210)
        # Of each 128: 64 bytes of low halves, 32 bytes of two high bits each for numbers 32 apart.
        low = blocks[..., :128].reshape(num_rows, -1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
        high = blocks[..., 128:192].reshape(num_rows, -1, 2, 1, 32)
        high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None]
        codes = (low & 15).reshape(num_rows, -1) | ((high & 3) << 4).reshape(num_rows, -1)
        scales = blocks[..., 192:208].view(np.int8).reshape(num_rows, -1)
        supers = np.ascontiguousarray(blocks[..., 208:]).view(np.float16)
        return Parts(codes, scales, np.empty((num_rows, 0), np.int8), supers)
    # Two supers, scales and offsets of 6 bits each in 12 bytes, high bits of 5, codes.
    blocks = rows.reshape(num_rows, -1, 144 if form.bits == 4 else 176)
    supers = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
    first, second, rest = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=-1)
    offsets = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=-1)
    # Of each 64: the low halves of 32 bytes, then their high halves.
    low = blocks[..., -128:].reshape(num_rows, -1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None]
    codes = (low & 15).reshape(num_rows, -1)
    if form.bits == 5:  # bit i of a byte is of the group i
        high = blocks[..., 16:48].reshape(num_rows, -1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]
        codes |= ((high & 1) << 4).reshape(num_rows, -1)
    scales, offsets = scales.reshape(num_rows, -1), offsets.reshape(num_rows, -1)
    return Parts(codes, scales, offsets, supers)
