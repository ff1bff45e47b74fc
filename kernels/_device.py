"""Device functions that several kernels use."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 operands as integers, truncates where it should round, and loses subnormals.
# There, operands of 16 bits are widened to float32 before a dot: the tensor-core path is compiled, not executed.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Convert to ``dtype``, rounding to nearest even; by hand for the interpreter's bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x00400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Convert a loaded value to the wider ``dtype``; by hand for the interpreter, which loses bfloat16 subnormals."""
    if INTERPRET and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def operand(x):
    """``x`` as a dot operand."""
    if INTERPRET and x.dtype.primitive_bitwidth == 16:
        return widen(x, tl.float32)
    else:
        return x


@triton.jit
def power_of_two_scale(norm):
    """float32 power of two that brings ``norm`` into [1, 2) where float32 has it: an exact change of exponent.

    Products of scaled rows neither overflow nor vanish, at 1e30 as at 1e-30, and lose no bit.
    """
    exponent = (norm.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (tl.minimum(tl.maximum(254 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(norm, scale):
    """``1 / (norm * scale)``, and 0 for a zero vector; float64 in, float64 out."""
    wide = norm * scale.to(norm.dtype)
    return tl.where(wide == 0, 0.0, 1.0 / tl.where(wide == 0, 1.0, wide))


@triton.jit
def divide(a, b):
    """``a / b``, rounded correctly: float32's own division on a GPU is up to 2 ulp off."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def exp_of_negative(x):
    """``e^x`` for ``x <= 0``, to an ulp.

    A GPU's float32 exponential is 2^(x log2 e): the product's rounding alone is 2e-6 of the result at x = -30. Here the
    whole powers of two are taken off first, in two parts of ln 2 (the first has few enough bits to make it exact), and
    a series does the rest.
    """
    if x.dtype == tl.float32:
        x = tl.maximum(x, -110.0)  # 0 from there on
        n = tl.floor(x * LOG2E + 0.5)
        r = (x - n * 0.693145751953125) - n * 1.428606820309417e-06
        total = tl.full(x.shape, 1.0 / 5040, tl.float32)
        total = total * r + 1.0 / 720
        total = total * r + 1.0 / 120
        total = total * r + 1.0 / 24
        total = total * r + 1.0 / 6
        total = total * r + 0.5
        total = total * r + 1.0
        total = total * r + 1.0
        half = n.to(tl.int32) >> 1  # in two factors, so that the result may be subnormal
        total *= ((half + 127) << 23).to(tl.float32, bitcast=True)
        return total * ((n.to(tl.int32) - half + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.exp(x)


@triton.jit
def atanh_series(t, TERMS: tl.constexpr):
    """``2 atanh(t)`` for ``0 <= t <= 1/3``: accurate near 0, where the hardware's logarithm is not."""
    square = t * t
    total = tl.zeros_like(t) + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS):
        total = total * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * t * total


@triton.jit
def finite(highest):
    """``highest``, and 0 while nothing was seen: what exponentials are taken against is finite."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def online_step(highest, total, s, AXIS: tl.constexpr = 1, BASE_2: tl.constexpr = True):
    """One step of a log-sum-exp over ``AXIS`` of ``s``: the maximum so far, the sum of exponentials against it."""
    grown = tl.maximum(highest, tl.max(s, axis=AXIS))
    pivot = finite(grown)
    below = s - tl.expand_dims(pivot, AXIS)
    if BASE_2:
        total = total * tl.exp2(highest - pivot) + tl.sum(tl.exp2(below), axis=AXIS)
    else:
        total = total * tl.exp(highest - pivot) + tl.sum(tl.exp(below), axis=AXIS)
    return grown, total


@triton.jit
def online_merge(highest, total, other_highest, other_total):
    """Two such pairs, in base 2, become one."""
    grown = tl.maximum(highest, other_highest)
    pivot = finite(grown)
    return grown, total * tl.exp2(highest - pivot) + other_total * tl.exp2(other_highest - pivot)
