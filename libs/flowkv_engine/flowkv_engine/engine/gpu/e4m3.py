"""Floats of 8 bits (e4m3) in Triton kernels, as their codes: uint8.

Done with integers, so that GPUs without instructions for them (before 8.9) and the interpreter give the same
bits as torch, the smallest numbers and NaN included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(numbers, dtype: tl.constexpr):
    """Numbers of a pool, or codes of e4m3, as `dtype`."""
    if numbers.dtype == tl.uint8:
        codes = numbers.to(tl.uint16)
        # Seven bits up, sign and exponent are those of a float16, whose bias is less by 8: 2 ** 8.
        halves = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), halves).to(dtype)
    else:
        return numbers.to(dtype)


@triton.jit
def narrowed(numbers, dtype: tl.constexpr):
    """Numbers as a pool of `dtype` stores them, or as codes of e4m3, as `engine.attention.narrowed` gives."""
    if dtype == tl.uint8:
        bits = numbers.to(tl.float32).to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        least = tl.minimum(size, 0x43E00000)  # 448, the largest
        # 20 bits of the fraction go, to the nearest, ties to even. The exponent's bias is less by 120.
        normal = ((least + 0x7FFFF + ((least >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2 ** -6 all are multiples of 2 ** -9: so are the floats from 2 ** 14 on.
        small = (least.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        codes = tl.where(least < 0x3C800000, small, normal)
        return (tl.where(size > 0x7F800000, 0x7F, codes) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return numbers.to(dtype)
