"""Blocks that meet: atomic operations, fences, loads and stores with an order, and what the executor must see there."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.ptx.numbers_of_ptx import FLOATS, decode, encode
from tests.ptx.ptxemu import Fault, UnknownOpcode, opcodes, parse, run
from tests.ptx.test_executor import ORDERS, expect, out, text

ATOMICS = sorted(name.removeprefix("atom.") for name in opcodes() if name.startswith("atom."))
EDGES = {
    "f": [0.0, -0.0, 1.0, -1.5, 2.0**-140, 3e38, float("inf"), 1e-30],
    "i": [0, 1, 2, 31, -1, -2, 1 << 31, (1 << 31) - 1, 1 << 63, (1 << 63) - 1],
}


def meaning(name: str) -> Callable[[Any, Any, Any], Any]:
    """What an operation leaves behind, of what was there and its operands."""
    flush = FLOATS["f32"].flush
    return {
        "add": lambda a, b, _: FLOATS["f32"].round_float(flush(a) + flush(b)) if name == "add.f32" else a + b,
        "min": lambda a, b, _: min(a, b), "max": lambda a, b, _: max(a, b), "and": lambda a, b, _: a & b,
        "or": lambda a, b, _: a | b, "xor": lambda a, b, _: a ^ b, "exch": lambda a, b, _: b,
        "cas": lambda a, b, c: c if a == b else a, "inc": lambda a, b, _: 0 if a >= b else a + 1,
        "dec": lambda a, b, _: b if a == 0 or a > b else a - 1,
    }[name.split(".")[0]]  # fmt: skip


def kind_of(name: str) -> str:
    """PTX's type, bits taken as unsigned."""
    return name.split(".")[1].replace("b", "u")


def drawn(kind: str, count: int, generator: random.Random) -> list[int]:
    """Patterns."""
    size = int(kind[1:])
    if kind[0] == "f":
        values = [generator.choice(EDGES["f"]) if generator.random() < 0.3 else generator.uniform(-4, 4)
                  for _ in range(count)]  # fmt: skip
        return [encode(kind, float(np.float32(value)) if size == 32 else value) for value in values]
    return [(generator.choice(EDGES["i"]) if generator.random() < 0.7 else generator.getrandbits(size)) % (1 << size)
            for _ in range(count)]  # fmt: skip


def atomic_text(name: str, same_place: bool) -> str:
    """Every thread changes its own number, or all of them the first; old values go to the second array."""
    bits = int(name[-2:])
    letter, size = "r" if bits == 32 else "d", bits // 8
    lines = [f"mul.wide.u32 %d0, %t, {size};"]
    lines += [f"add.s64 %a{k}, %a{k}, %d0;" for k in (range(1, 4) if same_place else range(4))]
    lines += [f"ld.global.b{bits} %{letter}{k}, [%a{k}];" for k in (2, 3)]
    third = f", %{letter}3" if name.startswith("cas") else ""
    lines += [f"atom.global.{name} %{letter}4, [%a0], %{letter}2{third};", f"st.global.b{bits} [%a1], %{letter}4;"]
    return text("\n".join([*lines, "ret;"]), 4, threads=32)


@pytest.mark.parametrize("name", ATOMICS)
def test_is_what_its_meaning_says(name: str) -> None:
    kind, generator = kind_of(name), random.Random(name)
    dtype = np.uint32 if name.endswith("32") else np.uint64
    for _ in range(4):
        memory, second, third = (np.array(drawn(kind, 32, generator), dtype) for _ in range(3))
        second[::3] = memory[::3]  # so that some compare equal
        changed, old = memory.copy(), np.zeros_like(memory)
        run(atomic_text(name, False), 1, [changed, old, second, third])
        assert (old == memory).all()
        for before, b, c, after in zip(memory, second, third, changed, strict=True):
            values = [decode(kind, int(x)) for x in (before, b, c)]
            want = meaning(name)(*values)
            assert encode(kind, decode(kind, int(after))) == encode(kind, float(want) if kind[0] == "f" else want)


@pytest.mark.parametrize("order", ORDERS)
def test_each_thread_sees_what_another_left(order: int) -> None:
    total, old, ones, none = np.array([5], np.uint32), np.zeros(32, np.uint32), np.ones(32, np.uint32), out(32)
    run(atomic_text("add.u32", True), 1, [total, old, ones, none], order=order)
    assert total[0] == 37 and sorted(old) == list(range(5, 37))
    reduce = atomic_text("add.u32", True).replace("atom.global.add.u32 %r4, ", "red.global.add.u32 ")
    run(reduce.replace("st.global.b32 [%a1], %r4;", ""), 1, [total, old, ones, none], order=order)
    assert total[0] == 69


def test_changing_what_holds_no_value_is_a_fault() -> None:
    args = [out(32), out(32), out(32), out(32)]
    with pytest.raises(Fault, match="uninitialised"):
        run(atomic_text("add.u32", True), 1, args, uninitialised=[args[0]])
    with pytest.raises(Fault, match="bounds"):
        run(atomic_text("add.u32", False), 1, [out(31), *args[1:]])


def test_a_scope_within_the_grid_is_not_known() -> None:
    for line in ("atom.cta.global.add.u32 %r0, [%a0], 1;", "ld.acquire.cta.global.u32 %r0, [%a0];",
                 "red.shared.add.u32 [%r0], 1;", "atom.global.add.f16 %h0, [%a0], %h1;"):  # fmt: skip
        with pytest.raises(UnknownOpcode, match=line.split()[0]):
            parse(text(line + "\nret;"))


# Block 0 writes data and says so; block 1 waits for that and reads. %a0: the flag, %a1: data of a warp.
MESSAGE = """
mov.u32 %r0, %ctaid.x;
mad.wide.u32 %a1, %t, 4, %a1;
setp.eq.s32 %p0, %r0, 1;
setp.ne.s32 %p1, %t, 0;
@%p0 bra READER;
st.global.b32 [%a1], 7;
{barrier}
@%p1 bra DONE;
{signal}
bra DONE;
READER:
@%p1 bra WAITED;
AGAIN:
{wait}
setp.eq.s32 %p2, %r1, 0;
@%p2 bra AGAIN;
{after}
WAITED:
{barrier}
ld.global.b32 %r2, [%a1];
setp.ne.s32 %p2, %r2, 7;
@%p2 st.global.b32 [%a0], 9;
DONE:
ret;
"""
SIGNALS = {
    "store with release": "st.release.gpu.global.u32 [%a0], 1;",
    "fence, store": "fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%a0], 1;",
    "old fence, volatile": "membar.gl;\nst.volatile.global.u32 [%a0], 1;",
    "fence, add": "membar.gl;\natom.global.add.u32 %r3, [%a0], 1;",
    "add with release": "atom.acq_rel.gpu.global.add.u32 %r3, [%a0], 1;",
    "red with release": "red.release.gpu.global.add.u32 [%a0], 1;",
    "release, then another store": "st.release.gpu.global.u32 [%a0], 0;\nst.relaxed.gpu.global.u32 [%a0], 2;",
    "two, the first with release": "red.release.gpu.global.or.b32 [%a0], 1;\nred.relaxed.gpu.global.or.b32 [%a0], 2;",
}
NO_SIGNALS = {
    "plain": "st.global.u32 [%a0], 1;",
    "no fence": "st.relaxed.gpu.global.u32 [%a0], 1;",
    "add alone": "atom.global.add.u32 %r3, [%a0], 1;",
    "a fence too late": "st.volatile.global.u32 [%a0], 1;\nmembar.gl;",
    "a fence of the block": "membar.cta;\nst.relaxed.gpu.global.u32 [%a0], 1;",
}
WAITS = {
    "load with acquire": ("ld.acquire.gpu.global.u32 %r1, [%a0];", ""),
    "load, fence": ("ld.relaxed.gpu.global.u32 %r1, [%a0];", "fence.acq_rel.gpu;"),
    "volatile, old fence": ("ld.volatile.global.u32 %r1, [%a0];", "membar.gl;"),
    "or with acquire": ("nanosleep.u32 20;\natom.acquire.gpu.global.or.b32 %r1, [%a0], 0;", ""),
    "compare, fence": ("atom.global.cas.b32 %r1, [%a0], 0, 0;", "fence.sc.gpu;"),
}
NO_WAITS = {
    "no fence": ("ld.relaxed.gpu.global.u32 %r1, [%a0];", ""),
    "volatile alone": ("ld.volatile.global.u32 %r1, [%a0];", ""),
    "a fence of the block": ("ld.relaxed.gpu.global.u32 %r1, [%a0];", "fence.acq_rel.cta;"),
}


def message(signal: str, wait: tuple[str, str], order: int, barrier: str = "bar.sync 0;", threads: int = 64) -> None:
    body = MESSAGE.format(signal=signal, wait=wait[0], after=wait[1], barrier=barrier)
    if not barrier:
        body = body.replace("@%p1 bra DONE;", "setp.ne.s32 %p1, %t, 32;\n@%p1 bra DONE;")
    flag, data = np.zeros(1, np.uint32), np.zeros(threads, np.uint32)
    run(text(body, 2, threads), 2, [flag, data], order=order)
    assert flag[0] != 9


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_a_message_arrives(order: int) -> None:
    for signal in SIGNALS.values():
        for wait in WAITS.values():
            message(signal, wait, order)


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_a_message_without_its_order_is_a_race(order: int) -> None:
    faulty = [(signal, wait) for signal in NO_SIGNALS.values() for wait in WAITS.values()]
    faulty += [(signal, wait) for signal in SIGNALS.values() for wait in NO_WAITS.values()]
    for signal, wait in faulty:
        try:
            message(signal, wait, order)
        except Fault as fault:
            assert fault.kind in ("race", "deadlock"), fault  # a plain store need never be seen
        else:
            raise AssertionError((signal, wait))


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_a_fence_of_one_thread_says_nothing_of_other_warps(order: int) -> None:
    for signal in ("store with release", "old fence, volatile"):
        with pytest.raises(Fault, match="race"):
            message(SIGNALS[signal], WAITS["load with acquire"], order, barrier="")


# Each of the blocks writes its own number, and after a barrier of the grid sums up everybody's.
GRID = """
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %nctaid.x;
mad.lo.s32 %r2, %r0, 64, %t;
mad.wide.u32 %d0, %r2, 4, %a1;
setp.ne.s32 %p0, %t, 0;
{first}
st.global.b32 [%d0], %r2;
bar.sync 0;
@%p0 bra MET;
setp.eq.s32 %p1, %r0, 0;
sub.s32 %r3, -2147483647, %r1;
selp.b32 %r3, %r3, 1, %p1;
{arrive}
AGAIN:
{wait}
xor.b32 %r6, %r4, %r5;
setp.ge.s32 %p2, %r6, 0;
@%p2 bra AGAIN;
MET:
bar.sync 0;
{last}
mov.b32 %r8, 0;
mov.b32 %r9, 0;
mad.wide.u32 %d1, %t, 4, %a1;
SUM:
ld.global.b32 %r7, [%d1];
add.s32 %r8, %r8, %r7;
add.s64 %d1, %d1, 256;
add.s32 %r9, %r9, 1;
setp.lt.s32 %p3, %r9, %r1;
@%p3 bra SUM;
mad.wide.u32 %d2, %r2, 4, %a2;
st.global.b32 [%d2], %r8;
ret;
"""
ARRIVE, WAIT = "atom.acq_rel.gpu.global.add.u32 %r4, [%a0], %r3;", "ld.acquire.gpu.global.u32 %r5, [%a0];"


def meet(order: int = 0, blocks: int = 5, **parts: str) -> np.ndarray:
    resident = int(parts.pop("resident", 0))
    body = GRID.format(**{"first": "", "arrive": ARRIVE, "wait": WAIT, "last": "", **parts})
    state, numbers, sums = np.zeros(1, np.uint32), np.zeros(64 * blocks, np.uint32), np.zeros(64 * blocks, np.uint32)
    for _ in range(2):  # what it leaves behind serves the next launch
        run(text(body, 3), blocks, [state, numbers, sums], order=order, resident=resident)
        assert state[0] & 0x7FFFFFFF == 0
    return sums.reshape(blocks, 64)


@pytest.mark.parametrize("order", [*ORDERS, 11, 12])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_barrier_of_the_grid(order: int, blocks: int) -> None:
    assert (meet(order, blocks) == np.arange(64 * blocks).reshape(blocks, 64).sum(axis=0)).all()


@pytest.mark.parametrize("order", [*ORDERS, 12])  # in 11 all blocks have come before one goes on early
def test_a_planted_missing_barrier_of_the_grid_is_found(order: int) -> None:
    missing = {"arrive": "mov.b32 %r4, 0;", "wait": "ld.acquire.gpu.global.u32 %r5, [%a0];\nmov.b32 %r5, -2147483648;"}
    early = {"wait": WAIT + "\nmov.b32 %r5, %r4;\nxor.b32 %r5, %r5, -2147483648;"}
    weak = {"arrive": ARRIVE.replace(".acq_rel.gpu", ".relaxed.gpu")}
    blind = {"wait": WAIT.replace("acquire", "relaxed")}
    for parts in (missing, early, weak, blind):
        with pytest.raises(Fault, match="race"):
            meet(order, **parts)


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_a_write_after_the_read_of_another_block_is_a_race(order: int) -> None:
    again = "st.global.b32 [%d0], 3;"
    with pytest.raises(Fault, match="race"):
        meet(order, last=again)


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_a_standstill_of_the_grid_is_a_deadlock(order: int) -> None:
    with pytest.raises(Fault, match="deadlock.*block 1: .*line"):
        meet(order, arrive="setp.eq.s32 %p4, %r0, 2;\n@%p4 mov.b32 %r3, 0;\n" + ARRIVE)
    with pytest.raises(Fault, match="deadlock"):  # a grid that does not fit the part
        meet(order, resident="4")
    assert meet(order, resident="5").any()


@pytest.mark.parametrize("order", [*ORDERS, 11])
def test_plain_accesses_race_with_atomic_ones(order: int) -> None:
    body = """
mov.u32 %r0, %ctaid.x;
setp.eq.s32 %p0, %r0, 1;
@%p0 bra OTHER;
red.global.add.u32 [%a0], 1;
ret;
OTHER:
{0}
ret;
"""
    for other in ("ld.global.b32 %r1, [%a0];\nst.global.b32 [%a1], %r1;", "st.global.b32 [%a0], 77;"):
        with pytest.raises(Fault, match="race"):
            run(text(body.format(other), 2), 2, [out(1), out(1)], order=order)
    total = out(1)
    run(text(body.format("red.global.add.u32 [%a0], 10;"), 2), 2, [total, out(1)], order=order)
    assert total[0] == 64 * 11


def test_blocks_that_only_add_need_not_be_there_at_once() -> None:
    total = np.zeros(1, np.uint32)
    run(text("red.global.add.u32 [%a0], 1;\nret;"), 3000, [total], resident=2)
    assert total[0] == 64 * 3000


def test_warps_of_a_block_are_in_order_after_a_barrier() -> None:
    body = "red.global.add.u32 [%a0], 1;\nmad.wide.u32 %d0, %t, 4, %a1;\nst.global.b32 [%d0], %t;\n{0}\n"
    body += "xor.b32 %r0, %t, 32;\nmad.wide.u32 %d0, %r0, 4, %a1;\nld.global.b32 %r1, [%d0];\nret;"
    run(text(body.format("bar.sync 0;"), 2), 1, [out(1), out()])
    expect("race", body.format(""), out(1), out())
