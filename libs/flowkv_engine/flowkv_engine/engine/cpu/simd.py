"""Writes LLVM's IR for vectors of float32: loads, sums in registers, folds, exp. Knows no kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# mypy: disable-error-code="no-untyped-def,no-untyped-call"


Value = Any  # an SSA value of llvmlite, which has no types

# What numba compiles for: this processor, unless its settings say otherwise.
_HAS_AVX512 = binding.get_host_cpu_features().get("avx512f") and config.ENABLE_AVX and not config.CPU_NAME
LANES = 16 if _HAS_AVX512 else 8  # float32 numbers in a vector register

_LINE_BYTES = 64  # of a cache

_I16, _I32, INTP = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
_VECTOR = ir.VectorType(F32, LANES)
_INT_VECTOR = ir.VectorType(_I32, LANES)

# exp(r) for |r| <= ln(2) / 2, as the Taylor series with its coefficients 1/7! .. 1/0!: 1e-7 off at most.
_EXP_SERIES = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LOG2_E = 1.4426950408889634
_LN_2_HIGH, _LN_2_LOW = 0.693359375, -2.12194440e-4  # the first has few bits: its multiples are exact
_EXP_LOWEST = -87.0  # below, the result is no normal number


class Emit:
    """Writes the IR of one intrinsic."""

    def __init__(self, context: Any, builder: Any, signature: Any) -> None:
        self.b = builder
        self._context = context
        self._types = signature.args

    def array(self, place: int, value: Value) -> Any:
        """Argument `place`, an array: its struct with `.data`, and strides in bytes."""
        return self._context.make_array(self._types[place])(self._context, self.b, value)

    def intp(self, place: int, value: Value) -> Value:
        return self._context.cast(self.b, value, self._types[place], types.intp)

    def at(self, base: Value, *terms: tuple[Value, Value]) -> Value:
        """`base` and index * bytes for each term, as a byte pointer."""
        place = self.b.bitcast(base, ir.IntType(8).as_pointer())
        for index, num_bytes in terms:
            place = self.b.gep(place, [self.b.mul(index, num_bytes)])
        return place

    def skip(self, place: Value, num_bytes: int) -> Value:
        return self.b.gep(place, [INTP(num_bytes)])

    def load(self, place: Value, is_bfloat16: bool = False) -> Value:
        """`LANES` numbers from a byte pointer, as float32."""
        if not is_bfloat16:
            return self.b.load(self.b.bitcast(place, _VECTOR.as_pointer()), align=4)
        halves = self.b.load(self.b.bitcast(place, ir.VectorType(_I16, LANES).as_pointer()), align=2)
        bits = self.b.shl(self.b.zext(halves, _INT_VECTOR), _splat_int(16))
        return self.b.bitcast(bits, _VECTOR)

    def store(self, vector: Value, place: Value) -> None:
        self.b.store(vector, self.b.bitcast(place, _VECTOR.as_pointer()), align=4)

    def scalar_pointer(self, place: Value) -> Value:
        return self.b.bitcast(place, F32.as_pointer())

    def broadcast(self, number: Value) -> Value:
        first = self.b.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
        return self.b.shuffle_vector(
            first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INT_VECTOR, [0] * LANES)
        )

    def call(self, name: str, *arguments: Value) -> Value:
        """The intrinsic `llvm.<name>` for vectors."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(arguments))
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.b.call(function, arguments)

    def fma(self, left: Value, right: Value, total: Value) -> Value:
        return self.call("fma", left, right, total)

    def prefetch(self, place: Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.b.call(function, [place, _I32(0), _I32(3), _I32(1)])  # to read, into the first cache, data

    def prefetch_row(self, place: Value, num_bytes: int) -> None:
        for start in range(0, num_bytes, _LINE_BYTES):
            self.prefetch(self.skip(place, start))

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
            self.b.shuffle_vector(left, right, ir.Constant(_INT_VECTOR, list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return self.b.fadd(even, odd)

    def scaled(self, vector: Value, power: Value, mask: Value) -> Value:
        """`vector * 2 ** power`, whole numbers, and 0 where `mask` says no: one instruction of AVX-512."""
        arguments = [vector, power, splat(0.0), self.b.bitcast(mask, _I16), _I32(4)]  # 4: round as ever
        kind = ir.FunctionType(_VECTOR, [argument.type for argument in arguments])
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def registers(self, num: int) -> list[Value]:
        """Variables that become registers, zero at first."""
        variables = [cgutils.alloca_once(self.b, _VECTOR) for _ in range(num)]
        for variable in variables:
            self.b.store(ir.Constant(_VECTOR, [0.0] * LANES), variable)
        return variables


def splat(number: float) -> Value:
    return ir.Constant(_VECTOR, [number] * LANES)


def _splat_int(number: int) -> Value:
    return ir.Constant(_INT_VECTOR, [number] * LANES)


def exp(emit: Emit, vector: Value) -> Value:
    """exp of numbers <= 0, two units in the last place off at most; NaN stays NaN."""
    b = emit.b
    too_low = b.fcmp_ordered("<", vector, splat(_EXP_LOWEST))
    x = b.select(too_low, splat(_EXP_LOWEST), vector)
    power = emit.call("floor", emit.fma(x, splat(_LOG2_E), splat(0.5)))
    rest = emit.fma(power, splat(-_LN_2_HIGH), x)
    rest = emit.fma(power, splat(-_LN_2_LOW), rest)
    result = splat(_EXP_SERIES[0])
    for coefficient in _EXP_SERIES[1:]:
        result = emit.fma(result, rest, splat(coefficient))
    if LANES == 16:
        return emit.scaled(result, power, b.not_(too_low))
    # NaN has no integer, but then `result` is NaN whatever it is multiplied by.
    is_nan = b.fcmp_unordered("uno", power, power)
    exponent = b.fptosi(b.select(is_nan, splat(0.0), power), _INT_VECTOR)
    bits = b.shl(b.add(exponent, _splat_int(127)), _splat_int(23))
    scaled = b.fmul(result, b.bitcast(bits, _VECTOR))
    return b.select(too_low, splat(0.0), scaled)


# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"


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
