"""Vector code that no compiler finds by itself: tiles of dot products whose sums stay in registers.

Each is an intrinsic of numba that writes LLVM's IR. Every sum has one order, whatever runs beside it: a row
of a tile gets the same bits in a tile of one row as in one of eight.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flowkv_common.engine.vector_ir import INTP, LANES, Emit, Value, exp, splat

# A tile's sums, a vector of each of its panels and one input fill the registers: 32 of them, or 16.
TILE_ROWS = 8 if LANES == 16 else 4
TILE_PANELS = 3
_MAX_SUMS = TILE_ROWS * TILE_PANELS

_UNROLL = 4
_AHEAD = 64  # vectors of a panel between the one in use and the one prefetched: 4 KiB with AVX-512


def _literals(arguments: Sequence[Any]) -> list[int] | None:
    if all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return [argument.literal_value for argument in arguments]
    return None


@intrinsic(prefer_literal=True)
def panel_tile(typing_context, x, row, panels, panel, length, out, adds, num_rows, num_panels):
    """A tile of `out = x @ weight.T` (`+=` where `adds`) over the first `length` of K, a multiple of 4.

    The tile: `num_rows` rows from `row` on, and the columns of `num_panels` panels from `panel` on; both are
    constants. `x` [M, K], `panels` [P, K, LANES], `out` [M, P * LANES], float32, each row contiguous.
    """
    sizes = _literals((num_rows, num_panels))
    if sizes is None:
        return None
    indices = (types.intp, panels, types.intp, types.intp)
    signature = types.void(x, *indices, out, types.boolean, num_rows, num_panels)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (rows, cols), b = sizes, builder
        x_array, panel_array, out_array = (emit.array(place, arguments[place]) for place in (0, 2, 5))
        x_stride, out_stride = (
            cgutils.unpack_tuple(b, array.strides, 2)[0] for array in (x_array, out_array)
        )
        panel_stride = cgutils.unpack_tuple(b, panel_array.strides, 3)[0]
        row_numbers = [b.add(arguments[1], INTP(i)) for i in range(rows)]
        panel_numbers = [b.add(arguments[3], INTP(j)) for j in range(cols)]
        x_rows = [emit.at(x_array.data, (number, x_stride)) for number in row_numbers]
        sources = [emit.at(panel_array.data, (number, panel_stride)) for number in panel_numbers]
        sums = emit.registers(rows * cols)
        with cgutils.for_range(b, b.udiv(arguments[4], INTP(_UNROLL))) as loop:
            for offset in range(_UNROLL):
                k = b.add(b.mul(loop.index, INTP(_UNROLL)), INTP(offset))
                places = [emit.at(source, (k, INTP(4 * LANES))) for source in sources]
                weights = [emit.load(place) for place in places]
                for place in places:  # the processor looks ahead within a page only
                    emit.prefetch(emit.skip(place, 4 * LANES * _AHEAD))
                for i, x_row in enumerate(x_rows):
                    pointer = emit.scalar_pointer(emit.at(x_row, (k, INTP(4))))
                    number = emit.broadcast(b.load(pointer))
                    for j, weight in enumerate(weights):
                        total = sums[i * cols + j]
                        b.store(emit.fma(number, weight, b.load(total)), total)
        for i, row_number in enumerate(row_numbers):
            for j, panel_number in enumerate(panel_numbers):
                place = emit.at(out_array.data, (row_number, out_stride), (panel_number, INTP(4 * LANES)))
                total = b.load(sums[i * cols + j])
                with b.if_else(arguments[6]) as (add, replace):
                    with add:
                        emit.store(b.fadd(emit.load(place), total), place)
                    with replace:
                        emit.store(total, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def score_tile(typing_context, query, keys, ahead, token, head, length, scores, first, group_size, head_dim):
    """`scores[g, first + t] = query[g] . keys[token + t, head]` for all `g` and `LANES` tokens `t`.

    Those from `length` on repeat the last one before. The same tokens of `ahead`, as `keys`, are prefetched.
    `query` [group size, head dim] and `scores`
    [group size, any] float32, `keys` [tokens, kv heads, head dim] float32 or bfloat16 (as uint16).
    """
    sizes = _literals((group_size, head_dim))
    if sizes is None:
        return None
    indices = (types.intp, types.intp, types.intp)
    signature = types.void(query, keys, ahead, *indices, scores, types.intp, group_size, head_dim)
    item_bytes, is_bfloat16 = (4, False) if keys.dtype == types.float32 else (2, True)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (groups, dim), b = sizes, builder
        query_array, key_array, score_array = (emit.array(place, arguments[place]) for place in (0, 1, 6))
        query_stride = cgutils.unpack_tuple(b, query_array.strides, 2)[0]
        token_stride, head_stride, _ = cgutils.unpack_tuple(b, key_array.strides, 3)
        score_stride = cgutils.unpack_tuple(b, score_array.strides, 2)[0]
        queries = [emit.at(query_array.data, (INTP(g), query_stride)) for g in range(groups)]
        start_terms = (arguments[3], token_stride), (arguments[4], head_stride)
        base = emit.at(key_array.data, *start_terms)
        base_ahead = emit.at(emit.array(2, arguments[2]).data, *start_terms)
        last = b.sub(arguments[5], INTP(1))

        def products(t: int) -> list[Value]:
            """Of token `t` with each query, not yet summed over the lanes."""
            number = b.select(b.icmp_signed("<", INTP(t), last), INTP(t), last)
            place = emit.at(base, (number, token_stride))
            emit.prefetch_row(emit.at(base_ahead, (number, token_stride)), dim * item_bytes)
            totals = [splat(0.0)] * groups
            for start in range(0, dim, LANES):
                key = emit.load(emit.skip(place, start * item_bytes), is_bfloat16)
                totals = [
                    emit.fma(emit.load(emit.skip(query, 4 * start)), key, total)
                    for query, total in zip(queries, totals, strict=True)
                ]
            return totals

        def folded(t: int, num_tokens: int) -> list[Value]:
            """Depth first: few vectors wait in registers."""
            if num_tokens == 1:
                return products(t)
            half = num_tokens // 2
            pairs = zip(folded(t, half), folded(t + half, half), strict=True)
            return [emit.fold_pair(left, right) for left, right in pairs]

        for g, vector in enumerate(folded(0, LANES)):
            place = emit.at(score_array.data, (INTP(g), score_stride), (arguments[7], INTP(4)))
            emit.store(vector, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def value_tile(typing_context, weights, first, values, ahead, head, length, out, group_size, head_dim):
    """`out[g] += sum of weights[g, first + t] * values[t, head]` over the first `length` tokens `t`.

    Shapes, dtypes and `ahead` are as of `score_tile`; `out` [group size, head dim] float32.
    """
    sizes = _literals((group_size, head_dim))
    if sizes is None:
        return None
    indices = (types.intp, types.intp)
    signature = types.void(weights, types.intp, values, ahead, *indices, out, group_size, head_dim)
    item_bytes, is_bfloat16 = (4, False) if values.dtype == types.float32 else (2, True)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        (groups, dim), b = sizes, builder
        weight_array, value_array, out_array = (emit.array(place, arguments[place]) for place in (0, 2, 6))
        weight_stride = cgutils.unpack_tuple(b, weight_array.strides, 2)[0]
        token_stride, head_stride, _ = cgutils.unpack_tuple(b, value_array.strides, 3)
        out_stride = cgutils.unpack_tuple(b, out_array.strides, 2)[0]
        rows = [
            emit.at(weight_array.data, (INTP(g), weight_stride), (arguments[1], INTP(4)))
            for g in range(groups)
        ]
        outs = [emit.at(out_array.data, (INTP(g), out_stride)) for g in range(groups)]
        base = emit.at(value_array.data, (arguments[4], head_stride))
        base_ahead = emit.at(emit.array(3, arguments[3]).data, (arguments[4], head_stride))
        width = LANES * max(1, _MAX_SUMS // groups)  # of the dims at once: so that all sums are in registers
        for start in range(0, dim, width):
            offsets = range(start, min(start + width, dim), LANES)
            sums = emit.registers(groups * len(offsets))
            for g, place in enumerate(outs):
                for i, offset in enumerate(offsets):
                    b.store(emit.load(emit.skip(place, 4 * offset)), sums[g * len(offsets) + i])
            with cgutils.for_range(b, arguments[5]) as loop:
                place = emit.at(base, (loop.index, token_stride))
                if start == 0:
                    emit.prefetch_row(emit.at(base_ahead, (loop.index, token_stride)), dim * item_bytes)
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
def softmax_row(typing_context, row, num_vectors, least_peak):
    """Turns `row`, `num_vectors * LANES` scores, into `exp(score - peak)` in place -> (peak, their sum).

    The peak is the highest score, or `least_peak` if that is higher. NaN comes out as NaN. `row` is
    one-dimensional, float32, contiguous.
    """
    signature = types.UniTuple(types.float32, 2)(row, types.intp, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, builder, signature)
        b = builder
        data = emit.array(0, arguments[0]).data
        total, *peaks = emit.registers(1 + _UNROLL)
        for each in peaks:
            b.store(emit.broadcast(arguments[2]), each)

        def greater(left: Value, right: Value) -> Value:
            """One instruction; `right` where `left` is NaN."""
            return b.select(b.fcmp_ordered(">", left, right), left, right)

        # A chain of its own for each of several vectors, or every maximum would wait for the one before.
        num_rounds = b.udiv(arguments[1], INTP(_UNROLL))
        with cgutils.for_range(b, num_rounds) as loop:
            place = emit.at(data, (loop.index, INTP(_UNROLL * 4 * LANES)))
            for i, each in enumerate(peaks):
                b.store(greater(emit.load(emit.skip(place, 4 * LANES * i)), b.load(each)), each)
        with cgutils.for_range_slice(b, b.mul(num_rounds, INTP(_UNROLL)), arguments[1], INTP(1)) as (
            index,
            _,
        ):
            vector = emit.load(emit.at(data, (index, INTP(4 * LANES))))
            b.store(greater(vector, b.load(peaks[0])), peaks[0])
        peak = emit.fold(reduce(greater, map(b.load, peaks)), greater)
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
