"""Writes LLVM's IR for vectors of float32: loads, sums in registers, folds, exp. Knows no kernels."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import config, types
from numba.core import cgutils

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
