"""What each opcode means, written a second time and in another way: exact integers and fractions, rounded by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Number = Any  # int for integers, float for floats, bool for predicates, (low, high) for pairs


@dataclass(frozen=True)
class Float:
    """A binary format: bits of the significand, with the hidden one, and of the exponent."""

    precision: int
    exponent: int

    @property
    def size(self) -> int:
        """Bits in all."""
        return self.precision + self.exponent

    def decode(self, bits: int) -> float:
        """The number of a pattern."""
        stored = self.precision - 1
        sign = -1.0 if bits >> (self.size - 1) else 1.0
        exponent, fraction = bits >> stored & ((1 << self.exponent) - 1), bits & ((1 << stored) - 1)
        lowest = 2 - (1 << (self.exponent - 1)) - stored
        if exponent == (1 << self.exponent) - 1:
            return math.nan if fraction else sign * math.inf
        if exponent == 0:
            return sign * math.ldexp(fraction, lowest)
        return sign * math.ldexp(fraction + (1 << stored), lowest + exponent - 1)

    def encode(self, value: float) -> int:
        """The pattern of a number that the format has."""
        if value != value:
            return ((1 << (self.exponent + 1)) - 1) << (self.precision - 2)
        sign = (1 << (self.size - 1)) if math.copysign(1.0, value) < 0 else 0
        if math.isinf(value):
            return sign | ((1 << self.exponent) - 1) << (self.precision - 1)
        if value == 0:
            return sign
        lowest = 2 - (1 << (self.exponent - 1)) - (self.precision - 1)
        power = max(math.frexp(value)[1] - self.precision, lowest)
        whole = abs(Fraction(value)) / Fraction(2) ** power
        assert whole.denominator == 1 and whole < 1 << self.precision, value
        field = power - lowest
        return sign | (field << (self.precision - 1)) + int(whole)

    def round(self, exact: Fraction, negative_zero: bool = False) -> float:
        """To the nearest number, ties to the even one."""
        if exact == 0:
            return -0.0 if negative_zero else 0.0
        size = abs(exact)
        power = size.numerator.bit_length() - size.denominator.bit_length()
        power -= Fraction(2) ** power > size
        lowest = 2 - (1 << (self.exponent - 1)) - (self.precision - 1)
        step = Fraction(2) ** max(power - self.precision + 1, lowest)
        whole = round(size / step) * step
        if whole >= Fraction(2) ** (1 << (self.exponent - 1)):
            return math.inf if exact > 0 else -math.inf
        return float(whole) if exact > 0 else -float(whole)

    def round_float(self, value: float) -> float:
        """The same of a float, which may be infinite or NaN."""
        return self.round(Fraction(value), math.copysign(1.0, value) < 0) if math.isfinite(value) else value

    def flush(self, value: float) -> float:
        """Zero for what is subnormal."""
        smallest = math.ldexp(1.0, 2 - (1 << (self.exponent - 1)))
        return math.copysign(0.0, value) if 0 < abs(value) < smallest else value


F16, BF16, F32, F64 = Float(11, 5), Float(8, 8), Float(24, 8), Float(53, 11)
FLOATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def signed(value: int, bits: int) -> int:
    """Two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def decode(kind: str, bits: int) -> Number:
    """A pattern as PTX's type ``kind`` sees it."""
    if kind == "pred":
        return bool(bits)
    if kind.endswith("x2"):
        return decode(kind[:-2], bits & 0xFFFF), decode(kind[:-2], bits >> 16)
    if kind in FLOATS:
        return FLOATS[kind].decode(bits)
    size = int(kind[1:])
    return signed(bits, size) if kind[0] == "s" else bits & ((1 << size) - 1)


def encode(kind: str, value: Number) -> int:
    """The other way."""
    if kind == "pred":
        return int(value)
    if kind.endswith("x2"):
        return encode(kind[:-2], value[0]) | encode(kind[:-2], value[1]) << 16
    if kind in FLOATS:
        return FLOATS[kind].encode(value)
    return int(value) & ((1 << int(kind[1:])) - 1)


def _sum(form: Float, *terms: tuple[float, ...]) -> float:
    """The sum of products, rounded once; each term is a tuple of factors."""
    if not all(math.isfinite(factor) for term in terms for factor in term):
        sizes = [[math.copysign(1.0 if f else 0.0, f) if math.isfinite(f) else f for f in term] for term in terms]
        return sum(math.prod(term) for term in sizes)
    negative = all(math.prod(math.copysign(1.0, factor) for factor in term) < 0 for term in terms)
    return form.round(sum((math.prod(map(Fraction, term)) for term in terms), Fraction(0)), negative)


def _divide(form: Float, a: float, b: float) -> float:
    if a != a or b != b or (math.isinf(a) and math.isinf(b)) or (a == 0 and b == 0):
        return math.nan
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b) or a == 0:
        return sign * 0.0
    return form.round(Fraction(a) / Fraction(b))


def _root(form: Float, a: float) -> float:
    if a != a or a < 0:
        return math.nan
    if a == 0 or math.isinf(a):
        return a
    shift = 1200
    exact = Fraction(a)
    scaled = (exact.numerator << 2 * shift) // exact.denominator
    root = math.isqrt(scaled)
    inexact = root * root != scaled or (exact.numerator << 2 * shift) % exact.denominator != 0
    return form.round(Fraction(2 * root + inexact, 2 << shift))


def _least(a: float, b: float, sign: int) -> float:
    if a != a or b != b:
        return b if a != a else a
    if a == b:
        return a if (math.copysign(1.0, a) < 0) == (sign > 0) else b
    return min(a, b) if sign > 0 else max(a, b)


def _to_integer(value: float, kind: str) -> int:
    """Towards zero, saturated; NaN is 0."""
    bits = int(kind[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    if value != value:
        return 0
    if math.isinf(value):
        return high if value > 0 else low
    return min(max(int(value), low), high)


def _towards_even(value: float) -> float:
    return value if not math.isfinite(value) else math.copysign(float(round(Fraction(value))), value)


def _whole(of: Callable[[float], int]) -> Callable[[float], float]:
    return lambda value: value if not math.isfinite(value) else math.copysign(float(of(value)), value)


ROUNDINGS = {"rzi": _whole(math.trunc), "rmi": _whole(math.floor), "rpi": _whole(math.ceil), "rni": _towards_even}


def _quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _bytes_of(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for nibble in (selector >> 4 * i & 15 for i in range(4)):
        byte = source[nibble & 7]
        picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def _inserted(a: int, b: int, position: int, length: int, size: int) -> int:
    position, length = position & 255, min(length & 255, size)
    source, into = format(a, f"0{size}b")[::-1], list(format(b, f"0{size}b")[::-1])
    into[position : position + length] = source[:length][: max(size - position, 0)]
    return int("".join(into)[:size][::-1], 2)


def _field(a: int, position: int, length: int, kind: str) -> int:
    size, position, length = int(kind[1:]), position & 255, length & 255
    text = format(a & ((1 << size) - 1), f"0{size}b")[::-1]
    if length == 0:
        return 0
    sign = text[min(position + length - 1, size - 1)] if kind[0] == "s" else "0"
    found = (text[position:] + sign * 600)[:length] if position < size else sign * length
    return int((found + sign * size)[:size][::-1], 2)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def _compare(how: str, a: Any, b: Any, floating: bool) -> bool:
    unordered = floating and (a != a or b != b)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if floating and len(how) == 3:
        return unordered or COMPARISONS[how[:2]](a, b)
    return not unordered and COMPARISONS[how](a, b)


def _of_integers(op: str, kind: str, x: list[int]) -> int:
    size = int(kind[1:])
    mask = (1 << size) - 1
    a, b, c = (*x, 0, 0)[:3]
    return {
        "add": lambda: a + b, "sub": lambda: a - b, "mul.lo": lambda: a * b, "mad.lo": lambda: a * b + c,
        "mul.hi": lambda: (a * b) >> size, "div": lambda: _quotient(a, b),
        "rem": lambda: -1 if b == 0 else a - b * _quotient(a, b), "min": lambda: min(a, b), "max": lambda: max(a, b),
        "neg": lambda: -a, "abs": lambda: abs(a), "and": lambda: a & b, "or": lambda: a | b, "xor": lambda: a ^ b,
        "not": lambda: mask - (a & mask), "shl": lambda: a << b if b < size else 0,
        "shr": lambda: a >> b if b < size else (-1 if a < 0 else 0), "mov": lambda: a, "selp": lambda: a if c else b,
        "mul.wide": lambda: a * b, "mad.wide": lambda: a * b + c, "bfe": lambda: _field(a, b, c, kind),
        "prmt": lambda: _bytes_of(a, b, c), "popc": lambda: format(a, "b").count("1"),
        "brev": lambda: int(format(a, f"0{size}b")[::-1], 2), "bfind": lambda: a.bit_length() - 1,
        "bfind.shiftamt": lambda: size - a.bit_length() if a else -1,
        "bfi": lambda: _inserted(a, b, c, x[3], size),
        "clz": lambda: size - a.bit_length(), "shf.l.wrap": lambda: ((b << 32 | a) << (c % 32)) >> 32,
        "shf.r.wrap": lambda: (b << 32 | a) >> (c % 32),
    }[op]()  # fmt: skip


def _of_floats(op: str, form: Float, x: list[float]) -> float:
    a, b, c = (*x, 0.0, 0.0)[:3]
    return {
        "add": lambda: _sum(form, (a,), (b,)), "sub": lambda: _sum(form, (a,), (-b,)),
        "mul": lambda: _sum(form, (a, b)), "fma": lambda: _sum(form, (a, b), (c,)),
        "div": lambda: _divide(form, a, b), "rcp": lambda: _divide(form, 1.0, a),
        "sqrt": lambda: _root(form, a), "neg": lambda: -a, "abs": lambda: abs(a), "min": lambda: _least(a, b, 1),
        "max": lambda: _least(a, b, -1), "copysign": lambda: math.copysign(b, a),
        "min.NaN": lambda: math.nan if a != a or b != b else _least(a, b, 1),
        "max.NaN": lambda: math.nan if a != a or b != b else _least(a, b, -1), "mov": lambda: a,
        "selp": lambda: a if c else b,
    }[op]()  # fmt: skip


# Error of the approximate ones: units in the last place, or relative, or absolute.
APPROXIMATE: dict[str, tuple[Callable[..., float], float, str]] = {
    "ex2": (lambda a: 0.0 if a < -160 else math.inf if a > 128 else 2.0**a, 2.0, "ulp"),
    "lg2": (lambda a: math.nan if a < 0 else -math.inf if a == 0 else math.log2(a), 2.0**-22, "lg2"),
    "rcp": (lambda a: _divide(F64, 1.0, a), 1.0, "ulp"),
    "sqrt": (lambda a: _root(F64, a), 2.0**-23, "relative"),
    "rsqrt": (lambda a: math.nan if a < 0 else _divide(F64, 1.0, _root(F64, a)), 2.0**-22, "relative"),
    "div.full": (lambda a, b: _divide(F64, a, b), 2.0, "ulp"),
    "div": (lambda a, b: _divide(F64, a, b), 2.0, "ulp"),
}


def kinds_of(name: str) -> list[str]:
    """PTX types of result and operands of an opcode."""
    parts = name.split(".")
    op, last = parts[0], parts[-1]
    if op == "setp":
        return ["pred", last, last]
    if op == "selp":
        return [last, last, last, "pred"]
    if op == "cvt":
        target, source = parts[-2], parts[-1]
        if target.endswith("x2"):
            return [target, source, source]
        return [{"tf32": "f32"}.get(target, target), source]
    if op in ("shl", "shr"):
        return [last, last, "u32"]
    if op == "bfe":
        return [last, last, "u32", "u32"]
    if parts[1] == "wide":
        wide = f"{last[0]}{2 * int(last[1:])}"
        return [wide, last, last, wide][: 3 if op == "mul" else 4]
    if op == "bfi":
        return [last, last, last, "u32", "u32"]
    if op in ("popc", "clz", "bfind"):
        return ["u32", last]
    count = {"fma": 3, "mad": 3, "prmt": 3, "shf": 3, "neg": 1, "abs": 1, "not": 1, "mov": 1, "sqrt": 1, "rcp": 1,
             "brev": 1, "ex2": 1, "lg2": 1, "rsqrt": 1}.get(op, 2)  # fmt: skip
    return [last] * (count + 1)


def evaluate(name: str, x: list[Number]) -> Number:
    """The result of an exact opcode."""
    parts, kinds = name.split("."), kinds_of(name)
    op, last = parts[0], parts[-1]
    if op == "setp":
        return _compare(parts[1], *x, last in FLOATS)
    if last == "pred":
        return {"and": all(x), "or": any(x), "xor": x[0] != x[-1], "not": not x[0], "mov": x[0]}[op]
    if op == "cvt":
        return _convert(parts, kinds, x)
    if last in ("f16x2", "bf16x2"):
        rest = ".".join([*parts[:-1], last[:-2]])
        return tuple(evaluate(rest, [pair[half] for pair in x]) for half in (0, 1))
    if last not in FLOATS:
        op = ".".join(parts[:-1]) if op in ("mul", "mad", "shf", "bfind") else op
        return _of_integers(op, last, x)
    form = FLOATS[last]
    flush = form.flush if "ftz" in parts else lambda value: value
    if "sat" in parts:
        value = evaluate(name.replace(".sat", ""), x)
        return 0.0 if value != value else min(max(value, 0.0), 1.0)
    key = f"{op}.NaN" if "NaN" in parts else op
    return flush(_of_floats(key, form, [flush(value) if not isinstance(value, bool) else value for value in x]))


def _convert(parts: list[str], kinds: list[str], x: list[Number]) -> Number:
    target, source = kinds[0], kinds[1]
    a = x[0]
    if parts[1] == "rna":  # to the nearest number of 11 bits, ties away from zero, in float32's place
        if not math.isfinite(a):
            return a
        power = max(math.frexp(a)[1] - 1, -126)
        step = Fraction(2) ** (power - 10)
        near = math.floor(abs(Fraction(a)) / step + Fraction(1, 2)) * step
        return math.copysign(math.inf if near >= 2**128 else float(near), a)
    if target.endswith("x2"):
        form = FLOATS[target[:-2]]
        return tuple(form.round_float(value) for value in (x[1], x[0]))
    if target in FLOATS and source in FLOATS:
        if parts[1] in ROUNDINGS:
            return ROUNDINGS[parts[1]](F32.flush(a) if "ftz" in parts else a)
        return FLOATS[target].round_float(a)
    if target in FLOATS:
        return FLOATS[target].round(Fraction(a))
    if source in FLOATS:
        return _to_integer(ROUNDINGS[parts[1]](a), target)
    return a
