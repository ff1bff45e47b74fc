"""The executor on kernels written by hand: what it computes, and every fault that it must see."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.ptx.ptxemu import Fault, UnknownOpcode, parse, run


def text(body: str, parameters: int = 1, threads: int = 64) -> str:
    """A kernel of ``parameters`` pointers, which are in %a0, %a1, ...; the thread's number is in %t."""
    names = [f".param .u64 .ptr .global .align 1 k_param_{k}" for k in range(parameters)]
    loads = "\n".join(f"ld.param.b64 %a{k}, [k_param_{k}];" for k in range(parameters))
    return f"""
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(
{",".join(names)}
)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<40>;
.reg .b32 %t;
.reg .b64 %a<9>;
.reg .b64 %d<9>;
mov.u32 %t, %tid.x;
{loads}
{body}
}}
"""


def lanes(value: str = "%t", at: str = "%a0") -> str:
    """Store 32 bits in the thread's place."""
    return f"mad.wide.u32 {at}, %t, 4, {at};\nst.global.b32 [{at}], {value};\nret;"


def expect(kind: str, body: str, *args: object, threads: int = 64, **options: object) -> Fault:
    with pytest.raises(Fault) as caught:
        run(text(body, len(args), threads), 1, args, **options)
    assert caught.value.kind == kind, caught.value
    return caught.value


def out(threads: int = 64) -> np.ndarray:
    return np.zeros(threads, np.int32)


ORDERS = [0, 1, 2, 3]
EXCHANGE = """
shl.b32 %r0, %t, 2;
mov.b32 %r1, smem;
add.s32 %r2, %r1, %r0;
st.shared.b32 [%r2], %t;
{barrier}
xor.b32 %r3, %r0, {other};
add.s32 %r3, %r1, %r3;
ld.shared.b32 %r4, [%r3];
"""


@pytest.mark.parametrize("order", ORDERS)
def test_a_planted_race_is_found_in_every_order_of_the_warps(order: int) -> None:
    safe, racing = (EXCHANGE.format(barrier=b, other=128) + lanes("%r4") for b in ("bar.sync 0;", ""))
    result = out()
    run(text(safe), 1, [result], shared=256, order=order)
    assert result.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(Fault, match="race|uninitialised"):  # the latter where the reader comes first
        run(text(racing), 1, [out()], shared=256, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_write_after_a_read_is_a_race(order: int) -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;", other=128) + "{0}st.shared.b32 [%r2], 7;\n" + lanes("%r4")
    expect("race", body.replace("{0}", ""), out(), shared=256, order=order)
    run(text(body.replace("{0}", "bar.sync 0;")), 1, [out()], shared=256, order=order)


def test_two_writes_race_unless_they_agree() -> None:
    body = "mov.b32 %r1, smem;\nst.shared.b32 [%r1], {value};\nret;"
    expect("race", body.format(value="%t"), out(), shared=4)
    run(text(body.format(value="7")), 1, [out()], shared=4)


def test_lanes_of_one_warp_race_where_that_is_asked() -> None:
    body = EXCHANGE.format(barrier="{0}", other=4) + lanes("%r4")
    run(text(body.replace("{0}", "")), 1, [out()], shared=256)
    expect("race", body.replace("{0}", ""), out(), shared=256, strict_warps=True)
    run(text(body.replace("{0}", "bar.warp.sync -1;")), 1, [out()], shared=256, strict_warps=True)


def test_a_loop_whose_exit_is_below_its_body_waits_for_its_lanes() -> None:
    """Lanes leave after 1, 2, 3, 4 rounds; the shuffle behind needs them all, whatever the text's order."""
    body = """
and.b32 %r0, %t, 3;
mov.b32 %r1, 0;
bra LOOP;
EXIT:
shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
bra STORE;
LOOP:
add.s32 %r1, %r1, 1;
setp.gt.s32 %p0, %r1, %r0;
@%p0 bra EXIT;
bra LOOP;
STORE:
"""
    result = out()
    run(text(body + lanes("%r2")), 1, [result])
    assert result.tolist() == [(t & 3 ^ 1) + 1 for t in range(64)]


def test_deadlocks_are_reported() -> None:
    lane = "setp.eq.s32 %p0, %t, 3;\n@%p0 bra AWAY;\n{0}\nAWAY:\nret;"
    for instruction in ("bar.sync 0;", "shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;", "bar.warp.sync -1;"):
        assert "lanes" in str(expect("deadlock", lane.format(instruction), out()))
    warp = "setp.lt.s32 %p0, %t, 32;\n@%p0 bra AWAY;\nbar.sync 0;\nAWAY:\nret;"
    expect("deadlock", warp, out())
    expect("deadlock", "setp.lt.s32 %p0, %t, 32;\n@%p0 bra B;\nbar.sync 0;\nret;\nB:\nbar.sync 1;\nret;", out())
    expect("limit", "L:\nbra L;", out(), limit=1000)


def test_a_guard_skips_a_barrier_for_all_or_parts_the_warp() -> None:
    body = "setp.{0}.s32 %p0, %t, {1};\n@%p0 bar.sync 0;\n@%p0 shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;\nret;"
    run(text(body.format("lt", 0)), 1, [out()])
    run(text(body.format("ge", 0)), 1, [out()])
    expect("divergence", body.format("lt", 3), out())
    skipped = EXCHANGE.format(barrier="setp.lt.s32 %p0, %t, 0;\n@%p0 bar.sync 0;", other=128) + lanes("%r4")
    with pytest.raises(Fault, match="race|uninitialised"):
        run(text(skipped), 1, [out()], shared=256)


COPY = """
mov.b32 %r0, smem;
shl.b32 %r1, %t, 2;
add.s32 %r0, %r0, %r1;
mad.wide.u32 %a1, %t, 4, %a1;
cp.async.ca.shared.global [%r0+0], [%a1+0], 0x4, {given};
cp.async.commit_group;
{wait}
ld.shared.b32 %r2, [%r0];
"""


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_a_copy_arrives_at_the_wait(wait: str) -> None:
    source, result = np.arange(64, dtype=np.int32) + 100, out()
    run(text(COPY.format(wait=wait, given="4") + lanes("%r2"), 2), 1, [result, source], shared=256)
    assert (result == source).all()
    run(text(COPY.format(wait=wait, given="0") + lanes("%r2"), 2), 1, [result, source], shared=256)
    assert (result == 0).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;", "bar.sync 0;"])
def test_a_planted_missing_wait_is_found(wait: str) -> None:
    expect("pending", COPY.format(wait=wait, given="4") + lanes("%r2"), out(), out(), shared=256)


def test_what_another_thread_copied_needs_a_barrier_too() -> None:
    body = COPY.replace("ld.shared.b32 %r2, [%r0];", "{barrier} xor.b32 %r3, %r0, 128;\nld.shared.b32 %r2, [%r3];")
    body = body.replace("{given}", "4") + lanes("%r2")
    source, result = np.arange(64, dtype=np.int32), out()
    wait = "cp.async.wait_group 0;"
    run(text(body.format(wait=wait, barrier="bar.sync 0;"), 2), 1, [result, source], shared=256)
    assert result.tolist() == [t ^ 32 for t in range(64)]
    for order in ORDERS:
        with pytest.raises(Fault, match=r"race|pending|uninitialised"):
            run(text(body.format(wait=wait, barrier=""), 2), 1, [out(), source], shared=256, order=order)
    with pytest.raises(Fault, match="pending"):
        run(text(body.format(wait="", barrier="bar.sync 0;"), 2), 1, [out(), source], shared=256)


def test_bounds_are_those_of_the_elements() -> None:
    expect("bounds", lanes(), out(63))
    gaps = np.zeros((64, 2), np.int32)[:, 0]
    expect("bounds", lanes(), gaps)
    run(text(lanes().replace("%t, 4", "%t, 8")), 1, [gaps])
    assert gaps.tolist() == list(range(64))
    expect("bounds", lanes(at="%a0").replace("[%a0]", "[%a0+-4]"), out())
    expect("bounds", "mov.b32 %r0, smem;\nld.shared.b32 %r1, [%r0+252];\nret;", out(), shared=252)
    wrong = text(lanes())
    with pytest.raises(
        Fault, match=r"line \d+: thread 63 of block 0 writes 4 bytes outside of all arrays, 4 bytes beyond"
    ):
        run(wrong, 1, [out(63)])


def test_bounds_of_overlapping_and_torch_arrays() -> None:
    whole = torch.zeros(2, 64, dtype=torch.int32)
    run(text(lanes() + "\n", 2), 1, [whole[1], whole])
    assert whole.tolist() == [[0] * 64, list(range(64))]
    columns = torch.zeros(64, 3, 5, dtype=torch.int32)[:, 1, 2]
    run(text(lanes().replace("%t, 4", "%t, 60")), 1, [columns])
    assert columns.tolist() == list(range(64))
    expect("bounds", lanes().replace("%t, 4", "%t, 56"), columns)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_signed_load_fills_a_wider_register(bits: int) -> None:
    numbers = np.arange(-32, 32).astype(f"int{bits}")
    result, size = np.zeros(64, np.int64), bits // 8
    body = f"mad.wide.u32 %a1, %t, {size}, %a1;\nld.global.s{bits} %d0, [%a1];\nmad.wide.u32 %a0, %t, 8, %a0;\n"
    run(text(body + "st.global.b64 [%a0], %d0;\nret;", 2), 1, [result, numbers])
    assert (result == numbers).all()


def test_parameters_have_addresses() -> None:
    """Those of a struct that is passed by value are chosen by address."""
    body = "mov.b64 %d0, k_param_1;\nadd.s64 %d1, %d0, 8;\nsetp.lt.s32 %p0, %t, 3;\nselp.b64 %d0, %d0, %d1, %p0;\n"
    body += "ld.param.b32 %r1, [%d0+8];\n"
    kernel = text(body + lanes("%r1"), 1).replace("\n)\n.reqntid", ",\n.param .align 8 .b8 k_param_1[24]\n)\n.reqntid")
    result = out()
    run(kernel, 1, [result, (5, 6, 7)])
    assert result.tolist() == [6] * 3 + [7] * 61
    with pytest.raises(Fault, match="bounds"):
        run(kernel.replace("[%d0+8]", "[%d0+16]"), 1, [result, (5, 6, 7)])


def test_misaligned_access_is_a_fault() -> None:
    expect("misaligned", "st.global.b32 [%a0+2], %t;\nret;", out())
    expect("misaligned", "mov.b32 %r0, smem;\nst.shared.v2.b32 [%r0+4], {%t, %t};\nret;", out(), shared=64)


def test_what_holds_no_value_may_be_moved_but_not_used() -> None:
    expect("uninitialised", lanes("%r9"), out())
    expect("uninitialised", "setp.eq.s32 %p0, %r9, 1;\n@%p0 bra L;\nL:\nret;", out())
    expect("uninitialised", "mov.b32 %r0, smem;\nld.shared.b32 %r1, [%r0];\nret;", out(), shared=4)
    expect("uninitialised", "add.s32 %r1, %r9, 1;\ncvt.u64.u32 %a1, %r1;\nst.global.b32 [%a1], %t;\nret;", out())
    run(
        text("add.s32 %r1, %r9, 1;\nsetp.eq.s32 %p0, %t, %t;\nselp.b32 %r2, %t, %r1, %p0;\n" + lanes("%r2")), 1, [out()]
    )
    fresh = out()
    body = "mad.wide.u32 %a1, %t, 4, %a1;\nld.global.b32 %r1, [%a1];\n" + lanes("%r1")
    run(text(body, 2), 1, [out(), fresh])
    with pytest.raises(Fault, match="uninitialised"):
        run(text(body, 2), 1, [out(), fresh], uninitialised=[fresh])
    known = np.zeros(256, np.uint8)
    run(text(lanes(), 1), 1, [fresh], uninitialised=[(fresh, known)])
    assert known.all()


def test_blocks_must_not_depend_on_each_other() -> None:
    body = """
mov.u32 %r1, %ctaid.x;
mad.wide.u32 %d0, %r1, 4, %a0;
st.global.b32 [%d0], %r1;
ld.global.b32 %r2, [%a0];
ret;
"""
    for order in ORDERS:
        with pytest.raises(Fault, match="race"):
            run(text(body), 3, [out() - 1], order=order)
    run(text(body.replace("ld.global.b32 %r2, [%a0];", "")), 3, [out()])


def test_unknown_opcodes_are_named() -> None:
    with pytest.raises(UnknownOpcode, match=r"line \d+: the executor does not know tanh.approx.f32 %r0, %r1"):
        parse(text("tanh.approx.f32 %r0, %r1;\nret;"))
    with pytest.raises(UnknownOpcode, match="atom.cta.global.add.u32"):
        parse(text("atom.cta.global.add.u32 %r0, [%a0], 1;\nret;"))
    with pytest.raises(UnknownOpcode, match="%a0 has 64 bits, not 32"):
        parse(text("add.s32 %r0, %a0, 1;\nret;"))


@pytest.mark.parametrize("clamp, how", list(itertools.product([31, 0x1C1F, 0x101F], ["bfly", "idx", "up", "down"])))
def test_shuffles(how: str, clamp: int) -> None:
    """Beside the definition by segments: within each, lanes are counted from its first."""
    size = {31: 32, 0x1C1F: 4, 0x101F: 16}[clamp]
    clamp = clamp & ~31 if how == "up" else clamp
    for by in (0, 1, 2, 3, 5, 17):
        result = out(32)
        run(text(f"shfl.sync.{how}.b32 %r1|%p0, %t, {by}, {clamp}, -1;\n@!%p0 add.s32 %r1, %r1, 100;\n" + lanes("%r1"),
                 threads=32), 1, [result])  # fmt: skip
        for lane, got in enumerate(result.tolist()):
            base, place = lane // size * size, lane % size
            there = {"bfly": (lane ^ by) - base, "idx": by % size, "up": place - by, "down": place + by}[how]
            inside = there < size if how != "up" else there >= 0
            assert got == (base + there if inside and (how != "bfly" or there >= 0) else lane + 100 if not inside else
                           base + there), (how, by, lane)  # fmt: skip


@pytest.mark.parametrize("op, of", [("add.s32", np.sum), ("max.s32", np.max), ("min.s32", np.min)])
def test_reductions(op: str, of: object) -> None:
    result = out()
    run(text(f"sub.s32 %r0, %t, 40;\nredux.sync.{op} %r1, %r0, -1;\n" + lanes("%r1")), 1, [result])
    want = [of(np.arange(start, start + 32) - 40) for start in (0, 32)]  # type: ignore[operator]
    assert result.tolist() == [want[0]] * 32 + [want[1]] * 32


@pytest.mark.parametrize("below, any_of, all_of", [(0, 0, 0), (1, 1, 0), (31, 1, 0), (32, 1, 1)])
def test_votes(below: int, any_of: int, all_of: int) -> None:
    body = f"setp.lt.s32 %p0, %t, {below};\nvote.sync.ballot.b32 %r1, %p0, -1;\n"
    body += "vote.sync.any.pred %p1, %p0, -1;\nvote.sync.all.pred %p2, %p0, -1;\n"
    body += "selp.b32 %r2, 1, 0, %p1;\nselp.b32 %r3, 2, 0, %p2;\nadd.s32 %r2, %r2, %r3;\n"
    body += "mad.wide.u32 %a1, %t, 4, %a1;\nst.global.b32 [%a1], %r2;\n"
    bits, which = np.zeros(32, np.uint32), out(32)
    run(text(body + lanes("%r1"), 2, threads=32), 1, [bits, which])
    assert (bits == (1 << below) - 1).all() and (which == any_of + 2 * all_of).all()


@pytest.mark.parametrize("count, transposed", list(itertools.product([1, 2, 4], [False, True])))
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Rows of 8 numbers of 16 bits, in a shared memory filled with their own places."""
    values = ", ".join(f"%r{20 + k}" for k in range(count))
    stores = "\n".join(f"st.global.b32 [%a0+{4 * k}], %r{20 + k};" for k in range(count))
    body = f"""
mov.b32 %r0, smem;
shl.b32 %r1, %t, 4;
add.s32 %r1, %r0, %r1;
shl.b32 %r2, %t, 3;
mad.lo.s32 %r3, %r2, 65537, 65536;
add.s32 %r4, %r3, 131074;
add.s32 %r5, %r4, 131074;
add.s32 %r6, %r5, 131074;
st.shared.v4.b32 [%r1], {{%r3, %r4, %r5, %r6}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{values}}}, [%r1];
mad.wide.u32 %a0, %t, {4 * count}, %a0;
{stores}
ret;
"""
    result = np.zeros((32, count, 2), np.uint16)
    run(text(body, threads=32), 1, [result], shared=512)
    matrices = np.arange(count * 64).reshape(count, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    assert (result == matrices.reshape(count, 32, 2).transpose(1, 0, 2)).all()


FRAGMENTS = {  # rows, columns, depth; numbers in a register of A and B; dtype
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, 8, 16, 2, torch.bfloat16),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, 8, 16, 2, torch.float16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (16, 8, 8, 2, torch.bfloat16),
    "m16n8k8.row.col.f32.f16.f16.f32": (16, 8, 8, 2, torch.float16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (16, 8, 8, 1, torch.float32),
    "m8n8k4.row.col.f64.f64.f64.f64": (8, 8, 4, 1, torch.float64),
}


@pytest.mark.parametrize("shape", FRAGMENTS)
def test_mma(shape: str) -> None:
    """Fragments as PTX draws them: A and B in quarters of 8 rows by 4 registers, C in pairs of columns."""
    m, n, k, per, dtype = FRAGMENTS[shape]
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, k), (n, k), (m, n)))
    if dtype == torch.float32:  # to numbers that tf32 has
        a, b = ((x.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    a, b, c = a.to(dtype), b.to(dtype), c.to(torch.float64 if dtype == torch.float64 else torch.float32)
    wide = dtype == torch.float64
    quarter = lambda x: x.reshape(x.shape[0] // 8, 8, x.shape[1] // (4 * per), 4, per).permute(1, 3, 2, 0, 4)  # noqa: E731
    # [8, 4, k blocks, row blocks, per] -> lanes, registers
    fragments = [quarter(x).reshape(32, -1, per).contiguous() for x in (a, b)]
    sums = c.reshape(m // 8, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, -1).contiguous()
    counts = [f.shape[1] for f in fragments]
    total, size, letter, bits = sums.shape[1], 8 if wide else 4, "d" if wide else "r", 64 if wide else 32
    loads, names, register = [], [], 10 if not wide else 0
    for index, count in ((1, counts[0]), (2, counts[1]), (3, total)):
        loads.append(f"mad.wide.u32 %a{index}, %t, {size * count}, %a{index};")
        names.append([f"%{letter}{register + j}" for j in range(count)])
        loads += [f"ld.global.b{bits} {name}, [%a{index}+{size * j}];" for j, name in enumerate(names[-1])]
        register += count
    results = [f"%{letter}{register + j}" for j in range(total)]
    vector = lambda x: "{" + ", ".join(x) + "}"  # noqa: E731
    body = "\n".join(loads) + f"\nmma.sync.aligned.{shape} {vector(results)}, {', '.join(map(vector, names))};\n"
    body += f"mad.wide.u32 %a0, %t, {size * total}, %a0;\n"
    body += "\n".join(f"st.global.b{bits} [%a0+{size * j}], {name};" for j, name in enumerate(results)) + "\nret;"
    got = torch.zeros_like(sums)
    run(text(body, 4, threads=32), 1, [got, *fragments, sums])
    got = got.reshape(8, 4, m // 8, 2).permute(2, 0, 1, 3).reshape(m, n)
    want = a.double() @ b.double().t() + c.double()
    unit = 2.0**-52 if wide else 2.0**-23
    terms = a.double().abs() @ b.double().abs().t() + c.double().abs()
    assert ((got.double() - want).abs() <= (k + 1) * unit * terms).all()
    assert (got.double() - want).abs().max() < 1e-5
