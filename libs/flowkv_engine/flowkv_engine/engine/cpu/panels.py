"""Weights in panels, in the form they are stored in, and tiles of products that widen them in registers.

A panel holds `LANES` columns of the output: one vector of it is one step of K. Panels of float32 are an array
[P, K, LANES]. Those of a stored form are an array [P, blocks] of records whose one field has the form's name.
A block is `SUPER_GROUP` numbers of each column if the form has supers, a group if it has full scales, else
`UNIT`: the columns' supers, or their scales and zeros, then units of `UNIT` numbers. A unit is its scales,
its offsets, and its codes: those of four bits eight to a word, `LANES` words side by side, so that one vector
of words gives the vectors of eight steps of K. Further bits of codes stand in words behind.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from flowkv_engine.engine.cpu.simd import (
    BFLOAT,
    HALF,
    INTP,
    LANES,
    LINE_BYTES,
    VECTOR,
    VECTOR_BYTES,
    Emit,
    Value,
    splat,
    splat_int,
)
from flowkv_engine.engine.stored import BFLOAT16, FORMS, GROUPED_FORMS, SUPER_GROUP, Form, Stored, parts_of

UNIT = 32  # numbers of a column; each form's groups fill it
_UNROLL = 4
# Bytes of a panel between those in use and those prefetched.
_AHEAD_BYTES, _AHEAD_FLOAT_BYTES = 1024, 64 * VECTOR_BYTES


def unit_bytes(form: Form) -> int:
    return LANES * (_scales_bytes(form) * (1 + form.has_offset) + UNIT * form.bits // 8)


def block_bytes(form: Form) -> int:
    return sum(num_bytes for _, num_bytes in _head(form)) * LANES + block_len(form) // UNIT * unit_bytes(form)


def block_len(form: Form) -> int:
    """Numbers of a column in a block: K is a multiple of it."""
    return SUPER_GROUP if form.has_supers else form.group if form.has_full_scales else UNIT


def _head(form: Form) -> list[tuple[int, int]]:
    """Of one column before a block's units: item size and bytes of each kind of number."""
    if form.has_supers:
        return [(2, 2 * (1 + form.has_offset))]
    if form.has_full_scales:
        return [(4, 4), (2, 2)] if form.has_zeros else [(4, 4)]
    return []


def _scales_bytes(form: Form) -> int:
    """Of one column's scales in a unit; its offsets take as many."""
    if form.bits == 16 or form.has_full_scales:
        return 0
    return UNIT // form.group * (1 if form.has_supers else 2)


_PIECE = 64  # panels that are packed at a time: what lies between is small beside a model's largest matrix

# --- packing ------------------------------------------------------------------------------------------


def form_of(panels: Any) -> Form | None:
    """The form of panels, or of an array type of numba; None for float32."""
    fields = getattr(panels.dtype, "fields", None)
    return next(form for form in (*FORMS, *GROUPED_FORMS) if form.name in fields) if fields else None


def pack_stored(*weights: Stored) -> NDArray[np.void]:
    """Weights [N_i, K] of one form and input, side by side -> panels [ceil(sum N_i / LANES), blocks].

    The last panel is padded with zero bytes: zeros, or with a float that is one.
    """
    form, num_blocks = weights[0].form, weights[0].shape[1] // block_len(weights[0].form)
    blocks = weights[0].blocks if len(weights) == 1 else np.concatenate([each.blocks for each in weights])
    panels = np.empty((-(-len(blocks) // LANES), num_blocks, block_bytes(form)), np.uint8)
    for start in range(0, len(panels), _PIECE):
        piece = panels[start : start + _PIECE]
        rows = blocks[start * LANES : (start + _PIECE) * LANES]
        columns = np.zeros((len(piece) * LANES, num_blocks, block_bytes(form) // LANES), np.uint8)
        _write_columns(Stored(form, rows), columns[: len(rows)])
        _interleave(form, columns, piece)
    return panels.view(np.dtype([(form.name, np.uint8, block_bytes(form))]))[..., 0]


def _parts(form: Form) -> list[tuple[int, int]]:
    """What a column's bytes in a block consist of: pairs of item size and bytes."""
    unit = []
    if scales := _scales_bytes(form) * (1 + form.has_offset):
        unit.append((1 if form.has_supers else 2, scales))
    codes = UNIT * form.bits // 8
    unit.append(({16: 2, 8: 1}.get(form.bits, 4), codes))
    return _head(form) + unit * (block_len(form) // UNIT)


def _write_columns(weight: Stored, columns: NDArray[np.uint8]) -> None:
    """The bytes of each column, one behind the other, to `columns` [N, blocks, bytes of a block]."""
    form = weight.form
    num_cols, num_blocks, _ = columns.shape
    units = num_blocks * block_len(form) // UNIT
    codes, scales, offsets, supers = parts_of(weight)
    groups = [each for each in (scales, offsets) if each.size]
    head = groups if form.has_full_scales else [supers] if form.has_supers else []
    parts = [_bytes(each, num_cols, units) for each in (() if form.has_full_scales else groups)]
    parts += [_bytes(words, num_cols, units) for words in _words(form, codes)]
    in_units = np.concatenate(parts, axis=-1).reshape(num_cols, num_blocks, -1)
    in_blocks = [_bytes(each, num_cols, num_blocks) for each in head]
    columns[...] = np.concatenate([*in_blocks, in_units], axis=-1)


def _bytes(numbers: NDArray[Any], num_cols: int, num_pieces: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(num_cols, num_pieces, -1)


def _words(form: Form, codes: NDArray[Any]) -> list[NDArray[Any]]:
    """The codes [N, K] as a unit has them: low halves of eight in a word, then words of the bits above."""
    if form.bits >= 8:
        return [codes]
    words = [_in_words(codes & 15, 4)]
    if form.bits > 4:
        words.append(_in_words(codes >> 4, form.bits - 4))
    return words


def _in_words(codes: NDArray[Any], num_bits: int) -> NDArray[np.uint32]:
    each = codes.reshape(len(codes), -1, 32 // num_bits)
    words = np.zeros(each.shape[:2], np.uint32)
    for place in range(32 // num_bits):
        words |= each[..., place].astype(np.uint32) << np.uint32(num_bits * place)
    return words


def _interleave(form: Form, columns: NDArray[np.uint8], panels: NDArray[np.uint8]) -> None:
    """`columns` [P * LANES, blocks, bytes] to `panels`: each item of `LANES` columns side by side."""
    num_panels, num_blocks, _ = panels.shape
    start = 0
    for size, part_bytes in _parts(form):
        part = columns[..., start : start + part_bytes]
        items = part.reshape(num_panels, LANES, num_blocks, part_bytes // size, size)
        place = slice(start * LANES, (start + part_bytes) * LANES)
        panels[..., place] = items.transpose(0, 2, 3, 1, 4).reshape(num_panels, num_blocks, -1)
        start += part_bytes


# --- widening -----------------------------------------------------------------------------------------


class _Block:
    """Where a panel's current block and unit are, and its supers. Emits code for one panel."""

    def __init__(self, emit: Emit, form: Form, place: Value) -> None:
        self._emit, self._form = emit, form
        self._supers: list[Value] = []
        if form.has_full_scales:
            # Of e4m3, codes become 1/256 of their number.
            scale = emit.load(place)
            self._full_scale = emit.b.fmul(scale, splat(256.0)) if form.is_e4m3 else scale
            self._zero = emit.load(emit.skip(place, 4 * LANES), HALF) if form.has_zeros else None
            place = emit.skip(place, (4 + 2 * form.has_zeros) * LANES)
        if form.has_supers:
            places = [emit.skip(place, 2 * LANES * i) for i in range(1 + form.has_offset)]
            self._supers = [emit.load(each, HALF) for each in places]
            place = emit.skip(place, 2 * LANES * (1 + form.has_offset))
        self._units = place

    def vectors(self, unit: Value) -> Iterator[Value]:
        """The panel's vectors at each step of K in this unit."""
        emit, form = self._emit, self._form
        place = emit.at(self._units, (unit, INTP(unit_bytes(form))))
        for start in range(0, unit_bytes(form), LINE_BYTES):
            emit.prefetch(emit.skip(place, start + _AHEAD_BYTES))
        num_scales = UNIT // form.group
        for k in range(UNIT):
            if form.bits == 16:
                kind = BFLOAT if form is BFLOAT16 else HALF
                yield emit.load(emit.skip(place, 2 * LANES * k), kind)
                continue
            if form.has_full_scales:
                yield emit.b.fmul(self._full(place, k), self._full_scale)
                continue
            if k % form.group == 0:
                scale = self._scale(place, k // form.group)
                offset = None
                if form.has_offset:
                    offset = self._offset(place, num_scales + k // form.group)
                elif form.zero:
                    offset = emit.b.fmul(scale, splat(-float(form.zero)))
            code = emit.b.sitofp(self._code(place, k), VECTOR)
            # Exact in float32 before the last addition, so this is what rounding twice gives as well.
            yield emit.b.fmul(code, scale) if offset is None else emit.call("fma", code, scale, offset)

    def _scale(self, unit: Value, number: int) -> Value:
        if not self._supers:
            return self._emit.load(self._emit.skip(unit, 2 * LANES * number), HALF)
        scale = self._small(unit, number, is_signed=not self._form.has_offset)
        return self._emit.b.fmul(scale, self._supers[0])

    def _offset(self, unit: Value, number: int) -> Value:
        if not self._supers:
            return self._emit.load(self._emit.skip(unit, 2 * LANES * number), HALF)
        return self._emit.b.fneg(self._emit.b.fmul(self._small(unit, number), self._supers[1]))

    def _small(self, unit: Value, number: int, is_signed: bool = False) -> Value:
        return self._emit.b.sitofp(
            self._emit.load_bytes(self._emit.skip(unit, LANES * number), is_signed), VECTOR
        )

    def _full(self, unit: Value, k: int) -> Value:
        """A vector of codes less their zeros, or of 1/256 of floats."""
        emit, b = self._emit, self._emit.b
        if not self._form.is_e4m3:
            return b.fsub(b.sitofp(self._code(unit, k), VECTOR), self._zero)
        return emit.load_e4m3_parts(emit.skip(unit, LANES * k))

    def _code(self, unit: Value, k: int) -> Value:
        emit, b, bits = self._emit, self._emit.b, self._form.bits
        codes = emit.skip(unit, LANES * _scales_bytes(self._form) * (1 + self._form.has_offset))
        if bits == 8:
            return emit.load_bytes(emit.skip(codes, LANES * k), is_signed=True)
        code = _bits_of(emit, codes, k, 4, 0)
        if bits == 4:
            return code
        high = emit.skip(codes, LANES * UNIT // 2)
        return b.or_(code, _bits_of(emit, high, k, bits - 4, 4))


def _bits_of(emit: Emit, words: Value, k: int, num_bits: int, to: int) -> Value:
    """Number `k` of those with `num_bits` in `words`, shifted to bit `to`."""
    per_word = 32 // num_bits
    word = emit.load_ints(emit.skip(words, 4 * LANES * (k // per_word)))
    shift = num_bits * (k % per_word) - to
    if shift > 0:
        word = emit.b.lshr(word, splat_int(shift))
    elif shift < 0:
        word = emit.b.shl(word, splat_int(-shift))
    return emit.b.and_(word, splat_int(((1 << num_bits) - 1) << to))


def _vectors(emit: Emit, panels: Any, sources: list[Value], length: Value) -> Iterator[Any]:
    """Inside of loops over K: the number of a step, and each panel's vectors from it on."""
    form = form_of(panels)
    if form is None:
        with cgutils.for_range(emit.b, emit.b.udiv(length, INTP(_UNROLL))) as loop:
            first = emit.b.mul(loop.index, INTP(_UNROLL))
            yield first, [_floats(emit, emit.at(source, (first, INTP(VECTOR_BYTES)))) for source in sources]
        return
    per_block = block_len(form) // UNIT
    with cgutils.for_range(emit.b, emit.b.udiv(length, INTP(block_len(form)))) as outer:
        blocks = [
            _Block(emit, form, emit.at(each, (outer.index, INTP(block_bytes(form))))) for each in sources
        ]
        with cgutils.for_range(emit.b, INTP(per_block)) as inner:
            unit = emit.b.add(emit.b.mul(outer.index, INTP(per_block)), inner.index)
            yield emit.b.mul(unit, INTP(UNIT)), [block.vectors(inner.index) for block in blocks]


def _floats(emit: Emit, place: Value) -> Iterator[Value]:
    for k in range(_UNROLL):
        here = emit.skip(place, VECTOR_BYTES * k)
        yield emit.load(here)
        emit.prefetch(emit.skip(here, _AHEAD_FLOAT_BYTES))  # the processor looks ahead within a page only


@intrinsic(prefer_literal=True)
def panel_tile(typing_context, x, row, panels, panel, length, out, adds, num_rows, num_panels):
    """A tile of `out = x @ weight.T` (`+=` where `adds`) over the first `length` of K.

    The tile: `num_rows` rows from `row` on, and the columns of `num_panels` panels from `panel` on; both are
    constants. `x` [M, K] and `out` [M, P * LANES] float32, each row contiguous. `length` is a multiple of 4,
    of the length of a block for stored forms. Panels of all forms give the same sums in the same order.
    """
    rows, cols = num_rows.literal_value, num_panels.literal_value
    indices = (types.intp, panels, types.intp, types.intp)
    signature = types.void(x, *indices, out, types.boolean, num_rows, num_panels)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        _, first_row, _, first_panel, length, _, adds, *_ = arguments
        x_data, (x_stride, _) = emit.array(0)
        panel_data, (panel_stride, *_) = emit.array(2)
        out_data, (out_stride, _) = emit.array(5)
        row_numbers = [b.add(first_row, INTP(i)) for i in range(rows)]
        panel_numbers = [b.add(first_panel, INTP(j)) for j in range(cols)]
        x_rows = [emit.at(x_data, (number, x_stride)) for number in row_numbers]
        sources = [emit.at(panel_data, (number, panel_stride)) for number in panel_numbers]
        sums = [emit.registers(cols) for _ in range(rows)]
        for first, vectors in _vectors(emit, panels, sources, length):
            places = [emit.at(x_row, (first, INTP(4))) for x_row in x_rows]
            for k, weights in enumerate(zip(*vectors, strict=True)):
                for place, totals in zip(places, sums, strict=True):
                    number = emit.broadcast_at(emit.skip(place, 4 * k))
                    for weight, total in zip(weights, totals, strict=True):
                        emit.add_product(number, weight, total)
        for row_number, totals in zip(row_numbers, sums, strict=True):
            for panel_number, variable in zip(panel_numbers, totals, strict=True):
                columns = (panel_number, INTP(VECTOR_BYTES))
                place, total = emit.at(out_data, (row_number, out_stride), columns), b.load(variable)
                with b.if_else(adds) as (add, replace):
                    with add:
                        emit.store(b.fadd(emit.load(place), total), place)
                    with replace:
                        emit.store(total, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def widen_panel(typing_context, panels, panel, out, place):
    """`out[place] =` a panel as float32 [K, LANES]; `panels` are of a stored form."""
    signature = types.void(panels, types.intp, out, types.intp)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        panel_data, (panel_stride, _) = emit.array(0)
        out_data, (out_stride, k_stride, _) = emit.array(2)
        source = emit.at(panel_data, (arguments[1], panel_stride))
        target = emit.at(out_data, (arguments[3], out_stride))
        length = b.udiv(out_stride, k_stride)
        for first, (vectors,) in _vectors(emit, panels, [source], length):
            here = emit.at(target, (first, INTP(VECTOR_BYTES)))
            for k, vector in enumerate(vectors):
                emit.store(vector, emit.skip(here, VECTOR_BYTES * k))
        return context.get_dummy_value()

    return signature, generate
