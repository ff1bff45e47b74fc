"""Each opcode on edge cases and drawn numbers, beside its meaning written a second time (numbers_of_ptx.py)."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tests.ptx.numbers_of_ptx import APPROXIMATE, FLOATS, decode, encode, evaluate, kinds_of
from tests.ptx.ptxemu import Kernel, opcodes
from tests.ptx.ptxemu.native import EACH_LANE, SELECT

LANES, ROUNDS = 32, 8
WIDTH = {"p": 1, "h": 16, "w": 32, "d": 64}
ALONE = sorted(name for name, opcode in opcodes().items() if opcode.kind in (EACH_LANE, SELECT))


def text_of(name: str, letters: str, guard: str = "") -> str:
    """A kernel of one warp that loads operands, runs the opcode, and stores the result."""
    store = {"p": "b32", "h": "b16", "w": "b32", "d": "b64"}
    register = {"p": "pred", "h": "b16", "w": "b32", "d": "b64"}
    lines = [".version 8.0", ".target sm_80", ".address_size 64", ".visible .entry one("]
    lines.append(",\n".join(f".param .u64 .ptr .global .align 1 one_param_{k}" for k in range(len(letters))))
    lines += [")", ".reqntid 32", "{"]
    lines += [f".reg .{register[letter]} %v{k};" for k, letter in enumerate(letters)]
    lines += [".reg .b64 %a<9>;", ".reg .b32 %t<9>;", "mov.u32 %t0, %tid.x;"]
    for k, letter in enumerate(letters):
        size = max(WIDTH[letter], 16) // 8 if letter != "p" else 4
        lines += [f"ld.param.b64 %a{k}, [one_param_{k}];", f"mad.wide.u32 %a{k}, %t0, {size}, %a{k};"]
        if letter == "p":
            lines += [f"ld.global.b32 %t{k + 1}, [%a{k}];", f"setp.ne.b32 %v{k}, %t{k + 1}, 0;"]
        else:
            lines.append(f"ld.global.{store[letter]} %v{k}, [%a{k}];")
    lines.append(f"{guard} {name} {', '.join(f'%v{k}' for k in range(len(letters)))};")
    if letters[0] == "p":
        lines += ["selp.b32 %t8, 1, 0, %v0;", "st.global.b32 [%a0], %t8;"]
    else:
        lines.append(f"st.global.{store[letters[0]]} [%a0], %v0;")
    return "\n".join([*lines, "ret;", "}"])


def patterns(kind: str, generator: random.Random) -> list[int]:
    """Edge cases of a type, then drawn ones."""
    if kind == "pred":
        return [generator.randrange(2) for _ in range(LANES * ROUNDS)]
    if kind.endswith("x2"):
        halves = [patterns(kind[:-2], generator) for _ in range(2)]
        generator.shuffle(halves[1])
        return [low | high << 16 for low, high in zip(*halves, strict=True)]
    if kind in FLOATS:
        form = FLOATS[kind]
        ones = (1 << (form.precision - 1)) - 1
        top = ((1 << form.exponent) - 1) << (form.precision - 1)
        edges = [0, 1, ones, ones + 1, top, top - 1, top | 1 << (form.precision - 2)]
        edges += [encode(kind, value) for value in (1.0, 1.5, 2.0, 0.5, 3.0, 100.0, 127.5, 254.0)]
        edges += [bits | 1 << (form.size - 1) for bits in edges]
        near = [encode(kind, form.round_float(generator.uniform(-4, 4))) for _ in range(LANES * 4)]
        return (edges + near + [generator.getrandbits(form.size) for _ in range(LANES * ROUNDS)])[: LANES * ROUNDS]
    size = int(kind[1:])
    edges = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 255, 256, -1, -2, -8, 1 << (size - 1), (1 << (size - 1)) - 1]
    drawn = [generator.getrandbits(generator.randrange(1, size + 1)) for _ in range(LANES * ROUNDS)]
    return [bits & ((1 << size) - 1) for bits in edges + drawn][: LANES * ROUNDS]


def operands(name: str) -> list[list[int]]:
    """Patterns for each operand, shuffled against each other."""
    generator = random.Random(name)
    rows = [
        patterns("u32" if kind == "b32" and name.startswith("prmt") else kind, generator) for kind in kinds_of(name)[1:]
    ]
    for row in rows[1:]:
        generator.shuffle(row)
    if name.startswith(("shl", "shr", "bfe", "bfi")):  # positions and lengths, most of them inside
        for row in rows[2 if name.startswith("bfi") else 1 :]:
            row[LANES:] = [generator.randrange(70) for _ in row[LANES:]]
    return rows


def execute(name: str, rows: list[list[int]], **options: float) -> list[int]:
    """The patterns of the results."""
    letters = opcodes()[name].registers
    types = {"p": np.uint32, "h": np.uint16, "w": np.uint32, "d": np.uint64}
    kernel, found = Kernel(text_of(name, letters)), []
    for start in range(0, len(rows[0]), LANES):
        arrays = [np.zeros(LANES, types[letters[0]])]
        arrays += [np.array(row[start : start + LANES], types[k]) for row, k in zip(rows, letters[1:], strict=True)]
        kernel(1, arrays, **options)
        found += arrays[0].tolist()
    return found


def test_types_have_the_registers_of_the_table() -> None:
    width = {"pred": "p", "16": "h", "32": "w", "64": "d", "x2": "w", "8": None}
    for name in ALONE:
        for kind, letter in zip(kinds_of(name), opcodes()[name].registers, strict=True):
            size = "pred" if kind == "pred" else "x2" if kind.endswith("x2") else kind.lstrip("bsufp")
            assert width[size] in (letter, None), name


@pytest.mark.parametrize("name", [name for name in ALONE if ".approx" not in name and ".full" not in name])
def test_is_what_its_meaning_says(name: str) -> None:
    kinds, rows = kinds_of(name), operands(name)
    for bits, got in zip(zip(*rows, strict=True), execute(name, rows), strict=True):
        values = [decode(kind, pattern) for kind, pattern in zip(kinds[1:], bits, strict=True)]
        if name.startswith("copysign") and values[0] != values[0]:
            continue  # a NaN's sign is not decoded
        want = evaluate(name, values)
        same = encode(kinds[0], decode(kinds[0], got)) == encode(kinds[0], want)  # one NaN is as good as another
        assert same, f"{name} of {values}: {decode(kinds[0], got)}, expected {want}"


APPROXIMATE_ONES = [name for name in ALONE if (".approx" in name or ".full" in name) and not name.endswith("f64")]


@pytest.mark.parametrize("name", APPROXIMATE_ONES)
def test_approximate_ones_are_off_by_no_more_than_documented_and_by_most_of_it(name: str) -> None:
    exact, bound, how = APPROXIMATE[name.split(".")[0] + (".full" if ".full" in name else "")]
    flush = FLOATS["f32"].flush if ".ftz" in name else lambda value: value
    rows, worst = operands(name), 0.0
    for bits, got in zip(zip(*rows, strict=True), execute(name, rows), strict=True):
        values = [flush(decode("f32", pattern)) for pattern in bits]
        want, ours = exact(*values), decode("f32", got)
        if want != want or abs(want) >= 2.0**127.9999 or (want == 0 and how != "lg2"):
            assert ours == FLOATS["f32"].round_float(want) or (ours != ours and want != want), (name, values)
            continue
        if abs(want) < 2.0**-126 and how != "lg2":
            assert abs(ours - want) <= 2.0**-126
            continue
        if how == "ulp":
            size = 2.0 ** (math.frexp(max(abs(want), abs(ours)))[1] - 24)
        else:
            size = 1.0 if how == "lg2" and 0.5 < values[0] < 2 else abs(want)
        rounding = 0.0 if how == "ulp" else abs(want) * 2.0**-24
        error = abs(ours - want)
        assert error <= bound * size + rounding, (name, values, ours, want)
        worst = max(worst, error / (bound * size))
    assert worst > 0.4


def test_the_gross_reciprocal_keeps_twenty_bits_and_no_more() -> None:
    name = "rcp.approx.ftz.f64"
    rows = [[encode("f64", 1 + k / 777) for k in range(LANES * ROUNDS)]]
    for bits, got in zip(rows[0], execute(name, rows), strict=True):
        assert got & 0xFFFFFFFF == 0
        assert abs(decode("f64", got) * decode("f64", bits) - 1) <= 2.0**-18


@pytest.mark.parametrize("name", ["ex2.approx.ftz.f32", "lg2.approx.f32", "div.full.f32", "sqrt.approx.f32"])
def test_the_error_can_be_left_out_and_drawn_anew(name: str) -> None:
    rows = operands(name)
    exact, drawn, other = (execute(name, rows, approximation=a, seed=s) for a, s in ((0.0, 0), (1.0, 0), (1.0, 1)))
    assert exact != drawn != other
    assert execute(name, rows, approximation=0.0, seed=1) == exact


def test_a_guard_leaves_other_lanes_alone() -> None:
    text = text_of("add.s32", "www").replace("add.s32", "setp.lt.u32 %q, %t0, 7;\n mov.b32 %v0, 99;\n@!%q add.s32")
    text = text.replace(".reg .b64 %a", ".reg .pred %q;\n.reg .b64 %a")
    out, ones = np.zeros(LANES, np.uint32), np.ones(LANES, np.uint32)
    Kernel(text)(1, [out, ones, ones])
    assert out.tolist() == [99] * 7 + [2] * 25
