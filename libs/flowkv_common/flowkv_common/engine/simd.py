"""Vector code that no compiler finds by itself: tiles of dot products whose sums stay in registers.

Each is an intrinsic of numba that writes LLVM's IR. Every sum has one order, whatever runs beside it: a row
of a tile gets the same bits in a tile of one row as in one of four.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flowkv_common.engine.vector_ir import F32, INTP, LANES, Emit, Value, exp, splat

# A tile's sums, its weights and one input fill the registers: 32 of them, or 16.
TILE_ROWS = 4
TILE_COLS = 6 if LANES == 16 else 3
_MAX_SUMS = TILE_ROWS * TILE_COLS


def _literals(arguments: Sequence[Any]) -> list[int] | None:
    if all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return [argument.literal_value for argument in arguments]
    return None


@intrinsic(prefer_literal=True)
def dot_tile(typing_context, x, row, w, col, out, adds, num_rows, num_cols):
    """`out[row + i, col + j] = x[row + i] . w[col + j]` for a tile, or `+=` where `adds`.

    `x` [M, K], `w` [N, K], `out` [M, N], float32 and contiguous; K a multiple of `LANES`. `num_rows` and
    `num_cols` are constants.
    """
    sizes = _literals((num_rows, num_cols))
    if sizes is None:
        return None
    signature = types.void(x, types.intp, w, types.intp, out, types.boolean, num_rows, num_cols)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (rows, cols), b = sizes, builder
        x_array, w_array, out_array = (emit.array(place, arguments[place]) for place in (0, 2, 4))
        x_stride, out_stride = (
            cgutils.unpack_tuple(b, array.strides, 2)[0] for array in (x_array, out_array)
        )
        w_stride = cgutils.unpack_tuple(b, w_array.strides, 2)[0]
        x_rows = [emit.at(x_array.data, (b.add(arguments[1], INTP(i)), x_stride)) for i in range(rows)]
        w_rows = [emit.at(w_array.data, (b.add(arguments[3], INTP(j)), w_stride)) for j in range(cols)]
        sums = emit.registers(rows * cols)
        with cgutils.for_range(b, b.udiv(x_stride, INTP(4 * LANES))) as loop:
            step = (loop.index, INTP(4 * LANES))
            weights = [emit.load(emit.at(place, step)) for place in w_rows]
            for place in w_rows:  # the next tile's weights: the processor doesn't look so far ahead
                emit.prefetch(emit.at(place, step, (INTP(cols), w_stride)))
            for i, place in enumerate(x_rows):
                numbers = emit.load(emit.at(place, step))
                for j, weight in enumerate(weights):
                    total = sums[i * cols + j]
                    b.store(emit.fma(numbers, weight, b.load(total)), total)
        for i in range(rows):
            place = emit.at(
                out_array.data, (b.add(arguments[1], INTP(i)), out_stride), (arguments[3], INTP(4))
            )
            for j in range(cols):
                pointer = emit.scalar_pointer(emit.skip(place, 4 * j))
                number = emit.fold(b.load(sums[i * cols + j]), b.fadd)
                before = b.select(arguments[5], b.load(pointer), F32(0.0))
                b.store(b.fadd(before, number), pointer)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def score_tile(typing_context, query, keys, head, length, scores, first, group_size, head_dim):
    """`scores[g, first + t] = query[g] . keys[t, head]` for all `g` and the first `length` tokens `t`.

    `query` [group size, head dim] and `scores` [group size, any] float32, `keys` [tokens, kv heads, head dim]
    float32 or bfloat16 (as uint16).
    """
    sizes = _literals((group_size, head_dim))
    if sizes is None:
        return None
    signature = types.void(query, keys, types.intp, types.intp, scores, types.intp, group_size, head_dim)
    item_bytes, is_bfloat16 = (4, False) if keys.dtype == types.float32 else (2, True)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (groups, dim), b = sizes, builder
        query_array, key_array, score_array = (emit.array(place, arguments[place]) for place in (0, 1, 4))
        query_stride = cgutils.unpack_tuple(b, query_array.strides, 2)[0]
        token_stride, head_stride, _ = cgutils.unpack_tuple(b, key_array.strides, 3)
        score_stride = cgutils.unpack_tuple(b, score_array.strides, 2)[0]
        queries = [emit.at(query_array.data, (INTP(g), query_stride)) for g in range(groups)]
        rows = [
            emit.at(score_array.data, (INTP(g), score_stride), (arguments[5], INTP(4))) for g in range(groups)
        ]
        base = emit.at(key_array.data, (arguments[2], head_stride))
        with cgutils.for_range(b, arguments[3]) as loop:
            place = emit.at(base, (loop.index, token_stride))
            totals = [splat(0.0)] * groups
            for start in range(0, dim, LANES):
                key = emit.load(emit.skip(place, start * item_bytes), is_bfloat16)
                totals = [
                    emit.fma(emit.load(emit.skip(query, 4 * start)), key, total)
                    for query, total in zip(queries, totals, strict=True)
                ]
            for row, total in zip(rows, totals, strict=True):
                pointer = emit.scalar_pointer(emit.at(row, (loop.index, INTP(4))))
                b.store(emit.fold(total, b.fadd), pointer)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def value_tile(typing_context, weights, first, values, head, length, out, group_size, head_dim):
    """`out[g] += sum of weights[g, first + t] * values[t, head]` over the first `length` tokens `t`.

    Shapes and dtypes are those of `score_tile`; `out` [group size, head dim] float32.
    """
    sizes = _literals((group_size, head_dim))
    if sizes is None:
        return None
    signature = types.void(weights, types.intp, values, types.intp, types.intp, out, group_size, head_dim)
    item_bytes, is_bfloat16 = (4, False) if values.dtype == types.float32 else (2, True)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (groups, dim), b = sizes, builder
        weight_array, value_array, out_array = (emit.array(place, arguments[place]) for place in (0, 2, 5))
        weight_stride = cgutils.unpack_tuple(b, weight_array.strides, 2)[0]
        token_stride, head_stride, _ = cgutils.unpack_tuple(b, value_array.strides, 3)
        out_stride = cgutils.unpack_tuple(b, out_array.strides, 2)[0]
        rows = [
            emit.at(weight_array.data, (INTP(g), weight_stride), (arguments[1], INTP(4)))
            for g in range(groups)
        ]
        outs = [emit.at(out_array.data, (INTP(g), out_stride)) for g in range(groups)]
        base = emit.at(value_array.data, (arguments[3], head_stride))
        width = LANES * max(1, _MAX_SUMS // groups)  # of the dims at once: so that all sums are in registers
        for start in range(0, dim, width):
            offsets = range(start, min(start + width, dim), LANES)
            sums = emit.registers(groups * len(offsets))
            for g, place in enumerate(outs):
                for i, offset in enumerate(offsets):
                    b.store(emit.load(emit.skip(place, 4 * offset)), sums[g * len(offsets) + i])
            with cgutils.for_range(b, arguments[4]) as loop:
                place = emit.at(base, (loop.index, token_stride))
                vectors = [
                    emit.load(emit.skip(place, item_bytes * offset), is_bfloat16) for offset in offsets
                ]
                for g, row in enumerate(rows):
                    weight = b.load(emit.scalar_pointer(emit.at(row, (loop.index, INTP(4)))))
                    factor = emit.broadcast(weight)
                    for i, vector in enumerate(vectors):
                        total = sums[g * len(offsets) + i]
                        b.store(emit.fma(factor, vector, b.load(total)), total)
            for g, place in enumerate(outs):
                for i, offset in enumerate(offsets):
                    emit.store(b.load(sums[g * len(offsets) + i]), emit.skip(place, 4 * offset))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def softmax_row(typing_context, row, num_vectors):
    """Turns `row`, `num_vectors * LANES` scores, into `exp(score - peak)` in place -> (peak, their sum).

    NaN comes out as NaN. `row` is one-dimensional, float32, contiguous.
    """
    signature = types.UniTuple(types.float32, 2)(row, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        b = builder
        data = emit.array(0, arguments[0]).data
        peaks, total = emit.registers(2)
        b.store(splat(-1e30), peaks)
        with cgutils.for_range(b, arguments[1]) as loop:
            vector = emit.load(emit.at(data, (loop.index, INTP(4 * LANES))))
            b.store(emit.call("maxnum", vector, b.load(peaks)), peaks)

        def greater(left: Value, right: Value) -> Value:
            return b.select(b.fcmp_ordered(">", left, right), left, right)

        peak = emit.fold(b.load(peaks), greater)
        peak_vector = emit.broadcast(peak)
        with cgutils.for_range(b, arguments[1]) as loop:
            place = emit.at(data, (loop.index, INTP(4 * LANES)))
            vector = exp(emit, b.fsub(emit.load(place), peak_vector))
            emit.store(vector, place)
            b.store(b.fadd(b.load(total), vector), total)
        sums = emit.fold(b.load(total), b.fadd)
        return context.make_tuple(b, signature.return_type, (peak, sums))

    return signature, generate


@intrinsic
def gate_row(typing_context, gates, ups, num_vectors):
    """`gates = silu(gates) * ups` in place, over `num_vectors * LANES` numbers, float32 and contiguous."""
    signature = types.void(gates, ups, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        b = builder
        gate_data, up_data = (emit.array(place, arguments[place]).data for place in (0, 1))
        with cgutils.for_range(b, arguments[2]) as loop:
            step = (loop.index, INTP(4 * LANES))
            place = emit.at(gate_data, step)
            gate, up = emit.load(place), emit.load(emit.at(up_data, step))
            power = exp(emit, b.fneg(emit.call("fabs", gate)))  # at most 1: nothing overflows
            is_negative = b.fcmp_ordered("<", gate, splat(0.0))
            sigmoid = b.fdiv(b.select(is_negative, power, splat(1.0)), b.fadd(splat(1.0), power))
            emit.store(b.fmul(b.fmul(gate, sigmoid), up), place)
        return context.get_dummy_value()

    return signature, generate
