"""Vector code that numba does not generate: the parts of tiles whose sums stay in registers, and exp.

Numba intrinsics, written as LLVM's IR, for float32 numbers in vectors of `LANES`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

Value = Any  # an SSA value of llvmlite, which has no types

# What numba compiles for: this processor, unless its settings say otherwise.
_HAS_AVX512 = binding.get_host_cpu_features().get("avx512f") and config.ENABLE_AVX and not config.CPU_NAME
LANES = 16 if _HAS_AVX512 else 8  # float32 numbers in a vector register
# A tile's sums, a vector of each of its panels and one input fill the registers: 32 of them, or 16.
TILE_ROWS = 8 if LANES == 16 else 4
TILE_PANELS = 3

VECTOR_BYTES = 4 * LANES
LINE_BYTES = 64  # of a cache
_UNROLL = 4

_I32, INTP = ir.IntType(32), ir.IntType(64)
_FLOAT, HALF, BFLOAT, E4M3 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(8)
VECTOR, INT_VECTOR = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
SHORT_VECTOR = ir.VectorType(ir.IntType(16), LANES)

# Bytes and kind of a number in memory, by the array's type.
_KINDS = {types.float32: (4, _FLOAT), types.uint16: (2, BFLOAT), types.uint8: (1, E4M3)}

# exp(r) for |r| <= ln(2) / 2: the polynomial whose largest error is least, 9e-8, with exp(0) = 1.
_EXP_SERIES = (8.29027214e-3, 4.18981598e-2, 1.66676381e-1, 4.99991478e-1, 9.99999706e-1, 1.0)
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453
# Numbers of this size have no fraction, so adding it rounds. The lowest bits of the sum with n are then those
# of the exponent of 2 ** n.
_ROUNDING = 1.5 * 2**23 + 127
_EXP_LOWEST = -127 * _LN_2  # here the exponent's bits are 0, and so is the result
_LARGE = 1e30  # finite, so that 0 times it is 0


def splat(number: float) -> Value:
    return ir.Constant(VECTOR, [number] * LANES)


def splat_int(number: int) -> Value:
    return ir.Constant(INT_VECTOR, [number] * LANES)


class Emit:
    """Writes the IR of one intrinsic. A place is a byte pointer."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.b = builder
        self._context, self._types, self._arguments = context, signature.args, arguments

    def array(self, number: int) -> tuple[Value, list[Value]]:
        """Argument `number`, an array: where its data begin, and its strides in bytes."""
        kind = self._types[number]
        array = self._context.make_array(kind)(self._context, self.b, self._arguments[number])
        return array.data, cgutils.unpack_tuple(self.b, array.strides, kind.ndim)

    def at(self, base: Value, *terms: tuple[Value, Value]) -> Value:
        """The place at `base` and index * bytes for each term."""
        place = self.b.bitcast(base, ir.IntType(8).as_pointer())
        for index, num_bytes in terms:
            place = self.b.gep(place, [self.b.mul(index, num_bytes)])
        return place

    def skip(self, place: Value, num_bytes: int) -> Value:
        return self.b.gep(place, [INTP(num_bytes)])

    def load(self, place: Value, kind: Any = _FLOAT) -> Value:
        """`LANES` numbers of `kind`, as float32. `BFLOAT` and `E4M3` are integers, the bits of one."""
        if kind is E4M3:
            codes = self.b.and_(self.load_bytes(place, False), splat_int(0x7F))
            is_nan = self.b.icmp_unsigned("==", codes, splat_int(0x7F))
            number = self.b.fmul(self.load_e4m3_parts(place), splat(256.0))
            return self.b.select(is_nan, splat(math.nan), number)
        size = 4 if kind is _FLOAT else 2
        numbers = self.b.load(self.b.bitcast(place, ir.VectorType(kind, LANES).as_pointer()), align=size)
        if kind is BFLOAT:
            return self.b.bitcast(self.b.shl(self.b.zext(numbers, INT_VECTOR), splat_int(16)), VECTOR)
        return numbers if kind is _FLOAT else self.b.fpext(numbers, VECTOR)

    def load_ints(self, place: Value) -> Value:
        """`LANES` integers of 32 bits."""
        return self.b.load(self.b.bitcast(place, INT_VECTOR.as_pointer()), align=4)

    def load_bytes(self, place: Value, is_signed: bool, kind: Any = INT_VECTOR) -> Value:
        """`LANES` integers of 8 bits, widened to those of `kind`."""
        pointer = self.b.bitcast(place, ir.VectorType(ir.IntType(8), LANES).as_pointer())
        return (self.b.sext if is_signed else self.b.zext)(self.b.load(pointer, align=1), kind)

    def load_e4m3_parts(self, place: Value) -> Value:
        """1/256 of `LANES` floats of 8 bits, as float32; NaN is taken for a number."""
        # Seven bits up, its sign and exponent are those of a float16, whose bias is less by 8: 2 ** 8.
        codes = self.load_bytes(place, True, SHORT_VECTOR)
        halves = self.b.shl(codes, ir.Constant(SHORT_VECTOR, [7] * LANES))
        halves = self.b.and_(halves, ir.Constant(SHORT_VECTOR, [0xBFFF] * LANES))
        return self.b.fpext(self.b.bitcast(halves, ir.VectorType(HALF, LANES)), VECTOR)

    def store(self, vector: Value, place: Value) -> None:
        self.b.store(vector, self.b.bitcast(place, VECTOR.as_pointer()), align=4)

    def broadcast(self, number: Value) -> Value:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = self.b.insert_element(undefined, number, _I32(0))
        return self.b.shuffle_vector(first, undefined, splat_int(0))

    def broadcast_at(self, place: Value) -> Value:
        return self.broadcast(self.b.load(self.b.bitcast(place, ir.FloatType().as_pointer())))

    def call(self, name: str, *arguments: Value) -> Value:
        """The intrinsic `llvm.<name>` for vectors."""
        kind = ir.FunctionType(VECTOR, [VECTOR] * len(arguments))
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.b.call(function, arguments)

    def prefetch(self, place: Value, num_bytes: int = 1) -> None:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        for start in range(0, num_bytes, LINE_BYTES):  # to read, into the first cache, data
            self.b.call(function, [self.skip(place, start), _I32(0), _I32(3), _I32(1)])

    def registers(self, num: int) -> list[Value]:
        """Variables that become registers, zero at first."""
        variables = [cgutils.alloca_once(self.b, VECTOR) for _ in range(num)]
        for variable in variables:
            self.b.store(splat(0.0), variable)
        return variables

    def add_product(self, left: Value, right: Value, variable: Value) -> None:
        """`variable += left * right`."""
        self.b.store(self.call("fma", left, right, self.b.load(variable)), variable)

    def fold(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes into one number, halves onto halves."""
        size = LANES
        while size > 1:
            size //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low, high = (
                self.b.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_I32, size), list(part)))
                for part in (range(size), range(size, 2 * size))
            )
            vector = combine(low, high)
        return self.b.extract_element(vector, _I32(0))

    def fold_pair(self, left: Value, right: Value) -> Value:
        """Neighbouring lanes added: sums of `left` in the first half, of `right` in the second.

        Done over and over it turns `LANES` vectors into one: lane i is the sum of vector i, all in one order.
        """
        even, odd = (
            self.b.shuffle_vector(left, right, ir.Constant(INT_VECTOR, list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return self.b.fadd(even, odd)

    def greater(self, left: Value, right: Value) -> Value:
        """One instruction; `right` where one is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", left, right), left, right)

    def exp(self, vector: Value) -> Value:
        """exp of numbers <= 0, its relative error 4e-7 at most (2e-7 from -10 on); NaN stays NaN.

        Few instructions: it is most of what prompts do beside products.
        """
        b = self.b
        x = self.greater(splat(_EXP_LOWEST), vector)
        rounded = self.call("fma", x, splat(_LOG2_E), splat(_ROUNDING))
        rest = self.call("fma", b.fsub(rounded, splat(_ROUNDING)), splat(-_LN_2), x)
        result = splat(_EXP_SERIES[0])
        for coefficient in _EXP_SERIES[1:]:
            result = self.call("fma", result, rest, splat(coefficient))
        power = b.bitcast(b.shl(b.bitcast(rounded, INT_VECTOR), splat_int(23)), VECTOR)
        return b.fmul(result, power)


@intrinsic(prefer_literal=True)
def score_tile(typing_context, query, pool, at, ahead, row_len, length, scores, first, group_size, head_dim):
    """`scores[g, first + t] = query[g] . key[t]` for all `g` and `LANES` tokens `t`.

    `pool` is one-dimensional, float32 or the bits of bfloat16 (uint16) or e4m3 (uint8): keys begin at number
    `at`, and each lies `row_len` numbers behind the one before. Those from `length` on repeat the last one
    before. As many are prefetched at `ahead`. `query` [group size, head dim] and `scores` [group size, any]
    float32.
    """
    groups, dim = group_size.literal_value, head_dim.literal_value
    indices = (types.intp, types.intp, types.intp, types.intp)
    signature = types.void(query, pool, *indices, scores, types.intp, group_size, head_dim)
    item_bytes, kind = _KINDS[pool.dtype]

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        at, ahead, row_len, length, _, first, *_ = arguments[2:]
        query_data, (query_stride, _) = emit.array(0)
        score_data, (score_stride, _) = emit.array(6)
        queries = [emit.at(query_data, (INTP(g), query_stride)) for g in range(groups)]
        base, base_ahead = (emit.at(emit.array(1)[0], (each, INTP(item_bytes))) for each in (at, ahead))
        token_stride, last = b.mul(row_len, INTP(item_bytes)), b.sub(length, INTP(1))

        def products(t: int) -> list[Value]:
            """Of token `t` with each query, not yet summed over the lanes."""
            number = b.select(b.icmp_signed("<", INTP(t), last), INTP(t), last)
            place = emit.at(base, (number, token_stride))
            emit.prefetch(emit.at(base_ahead, (number, token_stride)), dim * item_bytes)
            totals = [splat(0.0)] * groups
            for start in range(0, dim, LANES):
                key = emit.load(emit.skip(place, start * item_bytes), kind)
                totals = [
                    emit.call("fma", emit.load(emit.skip(query, 4 * start)), key, total)
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
            emit.store(vector, emit.at(score_data, (INTP(g), score_stride), (first, INTP(4))))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def value_tile(typing_context, weights, first, pool, at, ahead, row_len, length, out, group_size, head_dim):
    """`out[g] += sum of weights[g, first + t] * value[t]` over the first `length` tokens `t`.

    `weights` are as `scores` of `score_tile`, values lie in `pool` as its keys; `out` [group size, head dim]
    float32.
    """
    groups, dim = group_size.literal_value, head_dim.literal_value
    indices = (types.intp, types.intp, types.intp, types.intp)
    signature = types.void(weights, types.intp, pool, *indices, out, group_size, head_dim)
    item_bytes, kind = _KINDS[pool.dtype]

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        _, first, _, at, ahead, row_len, length, *_ = arguments
        weight_data, (weight_stride, _) = emit.array(0)
        out_data, (out_stride, _) = emit.array(7)
        rows = [emit.at(weight_data, (INTP(g), weight_stride), (first, INTP(4))) for g in range(groups)]
        outs = [emit.at(out_data, (INTP(g), out_stride)) for g in range(groups)]
        base, base_ahead = (emit.at(emit.array(2)[0], (each, INTP(item_bytes))) for each in (at, ahead))
        token_stride = b.mul(row_len, INTP(item_bytes))
        # Of the dims at once: so that all sums are in registers.
        width = LANES * max(1, TILE_ROWS * TILE_PANELS // groups)
        for start in range(0, dim, width):
            offsets = range(start, min(start + width, dim), LANES)
            sums = [emit.registers(len(offsets)) for _ in range(groups)]
            for place, totals in zip(outs, sums, strict=True):
                for offset, total in zip(offsets, totals, strict=True):
                    b.store(emit.load(emit.skip(place, 4 * offset)), total)
            with cgutils.for_range(b, length) as loop:
                place = emit.at(base, (loop.index, token_stride))
                if start == 0:
                    emit.prefetch(emit.at(base_ahead, (loop.index, token_stride)), dim * item_bytes)
                vectors = [emit.load(emit.skip(place, item_bytes * offset), kind) for offset in offsets]
                for row, totals in zip(rows, sums, strict=True):
                    factor = emit.broadcast_at(emit.at(row, (loop.index, INTP(4))))
                    for vector, total in zip(vectors, totals, strict=True):
                        emit.add_product(factor, vector, total)
            for place, totals in zip(outs, sums, strict=True):
                for offset, total in zip(offsets, totals, strict=True):
                    emit.store(b.load(total), emit.skip(place, 4 * offset))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def softmax_row(typing_context, row, num_vectors, least_max):
    """Turns `row`, `num_vectors * LANES` scores, into `exp(score - maximum)` -> (maximum, their sum).

    The maximum is the highest score, or `least_max` if that is higher. NaN comes out as NaN. `row` is
    one-dimensional, float32, contiguous.
    """
    signature = types.UniTuple(types.float32, 2)(row, types.intp, types.float32)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        (_, num_vectors, least_max), data = arguments, emit.array(0)[0]
        total, *maxima = emit.registers(1 + _UNROLL)
        for each in maxima:
            b.store(emit.broadcast(least_max), each)

        # A chain of its own for each of several vectors, or every maximum would wait for the one before.
        num_rounds = b.udiv(num_vectors, INTP(_UNROLL))
        with cgutils.for_range(b, num_rounds) as loop:
            place = emit.at(data, (loop.index, INTP(_UNROLL * VECTOR_BYTES)))
            for i, each in enumerate(maxima):
                b.store(emit.greater(emit.load(emit.skip(place, VECTOR_BYTES * i)), b.load(each)), each)
        rest = b.mul(num_rounds, INTP(_UNROLL))
        with cgutils.for_range_slice(b, rest, num_vectors, INTP(1)) as (index, _):
            vector = emit.load(emit.at(data, (index, INTP(VECTOR_BYTES))))
            b.store(emit.greater(vector, b.load(maxima[0])), maxima[0])
        maximum = emit.fold(reduce(emit.greater, map(b.load, maxima)), emit.greater)
        maximum_vector = emit.broadcast(maximum)
        with cgutils.for_range(b, num_vectors) as loop:
            place = emit.at(data, (loop.index, INTP(VECTOR_BYTES)))
            vector = emit.exp(b.fsub(emit.load(place), maximum_vector))
            emit.store(vector, place)
            b.store(b.fadd(b.load(total), vector), total)
        return context.make_tuple(b, signature.return_type, (maximum, emit.fold(b.load(total), b.fadd)))

    return signature, generate


@intrinsic
def gate_row(typing_context, gates, ups, num_vectors, activation):
    """`gates = activation of gates, times ups` in place, over `num_vectors * LANES` numbers.

    `gates` and `ups` are float32 and contiguous, `activation` a tuple of float32 (see `Activation`).
    """
    signature = types.void(gates, ups, types.intp, activation)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        emit = Emit(context, b, signature, arguments)
        (gate_data, _), (up_data, _) = emit.array(0), emit.array(1)
        numbers = [emit.broadcast(b.extract_value(arguments[3], number)) for number in range(4)]
        slope, cubic, limit, shift = numbers

        def least(left: Value, right: Value) -> Value:
            """`left` where it is NaN."""
            return b.select(b.fcmp_ordered(">", left, right), right, left)

        with cgutils.for_range(b, arguments[2]) as loop:
            place = emit.at(gate_data, (loop.index, INTP(VECTOR_BYTES)))
            gate = least(emit.load(place), limit)
            up = least(emit.load(emit.at(up_data, (loop.index, INTP(VECTOR_BYTES)))), limit)
            up = b.fadd(b.fneg(least(b.fneg(up), limit)), shift)
            square = least(b.fmul(gate, gate), splat(_LARGE))
            exponent = b.fmul(gate, emit.call("fma", cubic, square, slope))
            power = emit.exp(b.fneg(emit.call("fabs", exponent)))  # at most 1: nothing overflows
            is_negative = b.fcmp_ordered("<", gate, splat(0.0))
            sigmoid = b.fdiv(b.select(is_negative, power, splat(1.0)), b.fadd(splat(1.0), power))
            emit.store(b.fmul(b.fmul(gate, sigmoid), up), place)
        return context.get_dummy_value()

    return signature, generate
