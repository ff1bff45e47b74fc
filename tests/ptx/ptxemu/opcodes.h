// The meaning of every instruction that works on each lane alone: name, types of result and operands, value.
//
// One line an opcode. `a`, `b`, `c` are the operands in the types named, PTX's own names for them; a `bool` is a
// predicate. Instructions on memory, on a whole warp and on the flow of control are in machine.h.
#pragma once
#include "values.h"

#define FOR_INTEGERS(X) X("16", u16, s16) X("32", u32, s32) X("64", u64, s64)

#define INTEGERS(N, U, S)                                                                          \
    OP2("add.s" N, U, U, U, a + b)                                                                 \
    OP2("add.u" N, U, U, U, a + b)                                                                 \
    OP2("sub.s" N, U, U, U, a - b)                                                                 \
    OP2("sub.u" N, U, U, U, a - b)                                                                 \
    OP2("mul.lo.s" N, U, U, U, U(u64(a) * u64(b)))                                                 \
    OP2("mul.lo.u" N, U, U, U, U(u64(a) * u64(b)))                                                 \
    OP3("mad.lo.s" N, U, U, U, U, U(u64(a) * u64(b) + c))                                          \
    OP3("mad.lo.u" N, U, U, U, U, U(u64(a) * u64(b) + c))                                          \
    OP2("mul.hi.s" N, S, S, S, S((__int128(a) * b) >> (8 * sizeof(S))))                            \
    OP2("mul.hi.u" N, U, U, U, U((unsigned __int128)(a) * b >> (8 * sizeof(U))))                   \
    OP2("div.s" N, S, S, S, quotient(a, b))                                                        \
    OP2("div.u" N, U, U, U, quotient(a, b))                                                        \
    OP2("rem.s" N, S, S, S, remainder_of(a, b))                                                    \
    OP2("rem.u" N, U, U, U, remainder_of(a, b))                                                    \
    OP2("min.s" N, S, S, S, a < b ? a : b)                                                         \
    OP2("min.u" N, U, U, U, a < b ? a : b)                                                         \
    OP2("max.s" N, S, S, S, a > b ? a : b)                                                         \
    OP2("max.u" N, U, U, U, a > b ? a : b)                                                         \
    OP1("neg.s" N, U, U, U(0 - a))                                                                 \
    OP1("abs.s" N, U, S, a < 0 ? U(0 - U(a)) : U(a))                                               \
    OP2("and.b" N, U, U, U, a & b)                                                                 \
    OP2("or.b" N, U, U, U, a | b)                                                                  \
    OP2("xor.b" N, U, U, U, a ^ b)                                                                 \
    OP1("not.b" N, U, U, U(~a))                                                                    \
    OP2("shl.b" N, U, U, u32, shifted_left(a, b))                                                  \
    OP2("shr.u" N, U, U, u32, shifted_right(a, b))                                                 \
    OP2("shr.b" N, U, U, u32, shifted_right(a, b))                                                 \
    OP2("shr.s" N, S, S, u32, shifted_right(a, b))                                                 \
    OP1("mov.b" N, U, U, a)                                                                        \
    OP1("mov.u" N, U, U, a)                                                                        \
    OP1("mov.s" N, U, U, a)                                                                        \
    OP3("selp.b" N, U, U, U, bool, c ? a : b)                                                      \
    OP3("selp.u" N, U, U, U, bool, c ? a : b)                                                      \
    OP3("selp.s" N, U, U, U, bool, c ? a : b)                                                      \
    COMPARED("s" N, S)                                                                             \
    COMPARED("u" N, U)                                                                             \
    EQUAL("b" N, U)

#define EQUAL(T, t) OP2("setp.eq." T, bool, t, t, a == b) OP2("setp.ne." T, bool, t, t, a != b)
#define COMPARED(T, t)                                                                             \
    EQUAL(T, t)                                                                                    \
    OP2("setp.lt." T, bool, t, t, a < b)                                                           \
    OP2("setp.le." T, bool, t, t, a <= b)                                                          \
    OP2("setp.gt." T, bool, t, t, a > b)                                                           \
    OP2("setp.ge." T, bool, t, t, a >= b)
// Of floats: a comparison with NaN is false, the ones with a `u` are true.
#define ORDERED(T, t)                                                                              \
    OP2("setp.eq." T, bool, t, t, a == b)                                                          \
    OP2("setp.ne." T, bool, t, t, a < b || a > b)                                                  \
    OP2("setp.lt." T, bool, t, t, a < b)                                                           \
    OP2("setp.le." T, bool, t, t, a <= b)                                                          \
    OP2("setp.gt." T, bool, t, t, a > b)                                                           \
    OP2("setp.ge." T, bool, t, t, a >= b)                                                          \
    OP2("setp.equ." T, bool, t, t, !(a < b || a > b))                                              \
    OP2("setp.neu." T, bool, t, t, a != b)                                                         \
    OP2("setp.ltu." T, bool, t, t, !(a >= b))                                                      \
    OP2("setp.leu." T, bool, t, t, !(a > b))                                                       \
    OP2("setp.gtu." T, bool, t, t, !(a <= b))                                                      \
    OP2("setp.geu." T, bool, t, t, !(a < b))                                                       \
    OP2("setp.num." T, bool, t, t, a == a && b == b)                                               \
    OP2("setp.nan." T, bool, t, t, a != a || b != b)

#define FLOATS(T, t, same)                                                                         \
    OP2("add" T, t, t, t, same(a + b))                                                             \
    OP2("add.rn" T, t, t, t, same(a + b))                                                          \
    OP2("sub" T, t, t, t, same(a - b))                                                             \
    OP2("sub.rn" T, t, t, t, same(a - b))                                                          \
    OP2("mul" T, t, t, t, same(a * b))                                                             \
    OP2("mul.rn" T, t, t, t, same(a * b))                                                          \
    OP3("fma.rn" T, t, t, t, t, same(std::fma(a, b, c)))                                           \
    OP2("div.rn" T, t, t, t, same(a / b))                                                          \
    OP1("rcp.rn" T, t, t, same(t(1) / a))                                                          \
    OP1("sqrt.rn" T, t, t, same(std::sqrt(a)))                                                     \
    OP1("neg" T, t, t, same(-a))                                                                   \
    OP1("abs" T, t, t, same(std::fabs(a)))                                                         \
    OP2("min" T, t, t, t, same(smaller(a, b)))                                                     \
    OP2("max" T, t, t, t, same(larger(a, b)))                                                      \
    OP2("min.NaN" T, t, t, t, with_nan(a, b, same(smaller(a, b))))                                 \
    OP2("max.NaN" T, t, t, t, with_nan(a, b, same(larger(a, b))))

#define FLOAT_MOVES(N, F, U)                                                                       \
    OP2("copysign.f" N, F, F, F, std::copysign(b, a))                                              \
    OP1("mov.f" N, U, U, a)                                                                        \
    OP3("selp.f" N, U, U, U, bool, c ? a : b)                                                      \
    ORDERED("f" N, F)

#define SAME(x) (x)

// Two 16-bit numbers in a register.
struct pair {
    u16 low, high;
};
#define HALVES(T, t, op2, op3)                                                                     \
    OP2("add." T, t, t, t, op2(a, b, +))                                                           \
    OP2("add.rn." T, t, t, t, op2(a, b, +))                                                        \
    OP2("sub." T, t, t, t, op2(a, b, -))                                                           \
    OP2("mul." T, t, t, t, op2(a, b, *))                                                           \
    OP3("fma.rn." T, t, t, t, t, op3(a, b, c))                                                     \
    OP2("add." T "x2", pair, pair, pair, (paired<t>(a, b, [](t x, t y) { return op2(x, y, +); }))) \
    OP2("add.rn." T "x2", pair, pair, pair, (paired<t>(a, b, [](t x, t y) { return op2(x, y, +); }))) \
    OP2("sub." T "x2", pair, pair, pair, (paired<t>(a, b, [](t x, t y) { return op2(x, y, -); }))) \
    OP2("mul." T "x2", pair, pair, pair, (paired<t>(a, b, [](t x, t y) { return op2(x, y, *); }))) \
    OP3("fma.rn." T "x2", pair, pair, pair, pair,                                                  \
        (pair{std::bit_cast<u16>(op3(std::bit_cast<t>(a.low), std::bit_cast<t>(b.low), std::bit_cast<t>(c.low))), \
              std::bit_cast<u16>(op3(std::bit_cast<t>(a.high), std::bit_cast<t>(b.high), std::bit_cast<t>(c.high)))}))
template <class T, class F>
pair paired(pair a, pair b, F of) {
    return {std::bit_cast<u16>(of(std::bit_cast<T>(a.low), std::bit_cast<T>(b.low))),
            std::bit_cast<u16>(of(std::bit_cast<T>(a.high), std::bit_cast<T>(b.high)))};
}
// float32 has more than twice the bits and two: rounded twice is rounded once. Not with bfloat16's exponents.
#define HALF_OP(a, b, sign) f16(f32(a) sign f32(b))
#define BRAIN_OP(a, b, sign) brain<#sign[0]>(a, b)
template <char SIGN>
bf16 brain(bf16 a, bf16 b) {
    if constexpr (SIGN == '*') return product_bf16(a, b);
    return sum_bf16(a, SIGN == '-' ? bf16{u16(b.bits ^ 0x8000)} : b);
}

#define OPCODES                                                                                    \
    FOR_INTEGERS(INTEGERS)                                                                         \
    FLOATS(".f32", f32, SAME)                                                                      \
    FLOATS(".f64", f64, SAME)                                                                      \
    FLOAT_MOVES("32", f32, u32)                                                                    \
    FLOAT_MOVES("64", f64, u64)                                                                    \
    ORDERED("f16", f16)                                                                            \
    HALVES("f16", f16, HALF_OP, fma_f16)                                                           \
    HALVES("bf16", bf16, BRAIN_OP, fma_bf16)                                                       \
    /* flushed: subnormal operands and results are zeros */                                        \
    OP2("add.ftz.f32", f32, f32, f32, ftz(ftz(a) + ftz(b)))                                        \
    OP2("sub.ftz.f32", f32, f32, f32, ftz(ftz(a) - ftz(b)))                                        \
    OP2("mul.ftz.f32", f32, f32, f32, ftz(ftz(a) * ftz(b)))                                        \
    OP3("fma.rn.ftz.f32", f32, f32, f32, f32, ftz(std::fma(ftz(a), ftz(b), ftz(c))))               \
    OP1("abs.ftz.f32", f32, f32, ftz(std::fabs(a)))                                                \
    OP1("neg.ftz.f32", f32, f32, ftz(-a))                                                          \
    OP2("min.ftz.f32", f32, f32, f32, smaller(ftz(a), ftz(b)))                                     \
    OP2("max.ftz.f32", f32, f32, f32, larger(ftz(a), ftz(b)))                                      \
    OP3("fma.rn.sat.f32", f32, f32, f32, f32, saturated(std::fma(a, b, c)))                        \
    /* approximate, with the error that the PTX ISA documents */                                   \
    OP1("ex2.approx.f32", f32, f32, exponential(a))                             \
    OP1("ex2.approx.ftz.f32", f32, f32, ftz(exponential(ftz(a))))               \
    OP1("lg2.approx.f32", f32, f32, logarithm(a))                                                  \
    OP1("lg2.approx.ftz.f32", f32, f32, ftz(logarithm(ftz(a))))                                    \
    OP1("rcp.approx.f32", f32, f32, approximate_ulps(1 / f64(a), a, 0, 1))                         \
    OP1("rcp.approx.ftz.f32", f32, f32, ftz(approximate_ulps(1 / f64(ftz(a)), a, 0, 1)))           \
    OP1("sqrt.approx.f32", f32, f32, approximate(std::sqrt(f64(a)), a, 0x1p-23))                   \
    OP1("sqrt.approx.ftz.f32", f32, f32, ftz(approximate(std::sqrt(f64(ftz(a))), a, 0x1p-23)))     \
    OP1("rsqrt.approx.f32", f32, f32, approximate(1 / std::sqrt(f64(a)), a, 0x1p-22))              \
    OP1("rsqrt.approx.ftz.f32", f32, f32, ftz(approximate(1 / std::sqrt(f64(ftz(a))), a, 0x1p-22))) \
    OP2("div.full.f32", f32, f32, f32, approximate_ulps(f64(a) / f64(b), a, b, 2))                 \
    OP2("div.full.ftz.f32", f32, f32, f32, ftz(approximate_ulps(f64(ftz(a)) / f64(ftz(b)), a, b, 2))) \
    OP2("div.approx.f32", f32, f32, f32, approximate_ulps(f64(a) / f64(b), a, b, 2))               \
    OP1("rcp.approx.ftz.f64", f64, f64, gross_reciprocal(a))                                       \
    /* integers of two widths */                                                                   \
    OP2("mul.wide.s16", s32, s16, s16, s32(a) * s32(b))                                            \
    OP2("mul.wide.u16", u32, u16, u16, u32(a) * u32(b))                                            \
    OP2("mul.wide.s32", s64, s32, s32, s64(a) * s64(b))                                            \
    OP2("mul.wide.u32", u64, u32, u32, u64(a) * u64(b))                                            \
    OP3("mad.wide.s32", u64, s32, s32, u64, u64(s64(a) * s64(b)) + c)                              \
    OP3("mad.wide.u32", u64, u32, u32, u64, u64(a) * u64(b) + c)                                   \
    OP3("bfe.u32", u32, u32, u32, u32, extracted<u32>(a, b, c))                                    \
    OP3("bfe.s32", s32, s32, u32, u32, extracted<s32>(a, b, c))                                    \
    OP3("bfe.u64", u64, u64, u32, u32, extracted<u64>(a, b, c))                                    \
    OP3("bfe.s64", s64, s64, u32, u32, extracted<s64>(a, b, c))                                    \
    OP3("prmt.b32", u32, u32, u32, u32, permuted(a, b, c))                                         \
    OP3("shf.l.wrap.b32", u32, u32, u32, u32, u32((((u64(b) << 32) | a) << (c & 31)) >> 32))       \
    OP3("shf.r.wrap.b32", u32, u32, u32, u32, u32(((u64(b) << 32) | a) >> (c & 31)))               \
    OP1("popc.b32", u32, u32, u32(std::popcount(a)))                                               \
    OP1("popc.b64", u32, u64, u32(std::popcount(a)))                                               \
    OP1("clz.b32", u32, u32, u32(std::countl_zero(a)))                                             \
    OP1("clz.b64", u32, u64, u32(std::countl_zero(a)))                                             \
    OP1("brev.b32", u32, u32, turned(a))                                                           \
    OP1("brev.b64", u64, u64, turned(a))                                                           \
    OP1("bfind.u32", u32, u32, u32(31 - std::countl_zero(a)))                                      \
    OP1("bfind.u64", u32, u64, u32(63 - std::countl_zero(a)))                                      \
    OP1("bfind.shiftamt.u32", u32, u32, a == 0 ? u32(-1) : u32(std::countl_zero(a)))               \
    OP1("bfind.shiftamt.u64", u32, u64, a == 0 ? u32(-1) : u32(std::countl_zero(a)))               \
    OP4("bfi.b32", u32, u32, u32, u32, u32, inserted(a, b, c, d))                                  \
    OP4("bfi.b64", u64, u64, u64, u32, u32, inserted(a, b, c, d))                                  \
    /* predicates */                                                                               \
    OP2("and.pred", bool, bool, bool, a && b)                                                      \
    OP2("or.pred", bool, bool, bool, a || b)                                                       \
    OP2("xor.pred", bool, bool, bool, a != b)                                                      \
    OP1("not.pred", bool, bool, !a)                                                                \
    OP1("mov.pred", bool, bool, a)                                                                 \
    /* conversions */                                                                              \
    OP1("cvt.u16.u32", u16, u32, u16(a))                                                           \
    OP1("cvt.u16.u64", u16, u64, u16(a))                                                           \
    OP1("cvt.u32.u16", u32, u16, u32(a))                                                           \
    OP1("cvt.s32.s16", s32, s16, s32(a))                                                           \
    OP1("cvt.u32.u64", u32, u64, u32(a))                                                           \
    OP1("cvt.u64.u32", u64, u32, u64(a))                                                           \
    OP1("cvt.u64.u16", u64, u16, u64(a))                                                           \
    OP1("cvt.s64.s32", s64, s32, s64(a))                                                           \
    OP1("cvt.s64.s16", s64, s16, s64(a))                                                           \
    OP1("cvt.s16.s8", s16, u16, s16(s8(a)))                                                        \
    OP1("cvt.s32.s8", s32, u32, s32(s8(a)))                                                        \
    OP1("cvt.s64.s8", s64, u64, s64(s8(a)))                                                        \
    OP1("cvt.u16.u8", u16, u16, u16(u8(a)))                                                        \
    OP1("cvt.u32.u8", u32, u32, u32(u8(a)))                                                        \
    OP1("cvt.f32.f16", f32, f16, f32(a))                                                           \
    OP1("cvt.f32.bf16", f32, bf16, widened(a))                                                     \
    OP1("cvt.f64.f16", f64, f16, f64(a))                                                           \
    OP1("cvt.f64.f32", f64, f32, f64(a))                                                           \
    OP1("cvt.rn.f32.f64", f32, f64, f32(a))                                                        \
    OP1("cvt.rn.f16.f32", f16, f32, f16(a))                                                        \
    OP1("cvt.rn.f16.f64", f16, f64, f16(odd_float(a)))                                             \
    OP1("cvt.rn.bf16.f32", bf16, f32, to_bf16(a))                                                  \
    OP1("cvt.rn.bf16.f64", bf16, f64, to_bf16(odd_float(a)))                                       \
    OP2("cvt.rn.f16x2.f32", pair, f32, f32, (pair{std::bit_cast<u16>(f16(b)), std::bit_cast<u16>(f16(a))})) \
    OP2("cvt.rn.bf16x2.f32", pair, f32, f32, (pair{to_bf16(b).bits, to_bf16(a).bits}))             \
    OP1("cvt.rna.tf32.f32", u32, u32, (a & 0x7f800000) == 0x7f800000 ? a : (a + 0x1000) & 0xffffe000) \
    OP1("cvt.rn.f32.s16", f32, s16, f32(a))                                                        \
    OP1("cvt.rn.f32.u16", f32, u16, f32(a))                                                        \
    OP1("cvt.rn.f32.s32", f32, s32, f32(a))                                                        \
    OP1("cvt.rn.f32.u32", f32, u32, f32(a))                                                        \
    OP1("cvt.rn.f32.s64", f32, s64, f32(a))                                                        \
    OP1("cvt.rn.f32.u64", f32, u64, f32(a))                                                        \
    OP1("cvt.rn.f64.s16", f64, s16, f64(a))                                                        \
    OP1("cvt.rn.f64.u16", f64, u16, f64(a))                                                        \
    OP1("cvt.rn.f64.s32", f64, s32, f64(a))                                                        \
    OP1("cvt.rn.f64.u32", f64, u32, f64(a))                                                        \
    OP1("cvt.rn.f64.s64", f64, s64, f64(a))                                                        \
    OP1("cvt.rn.f64.u64", f64, u64, f64(a))                                                        \
    OP1("cvt.rzi.s32.f32", s32, f32, integer<s32>(a))                                              \
    OP1("cvt.rzi.u32.f32", u32, f32, integer<u32>(std::trunc(a)))                                  \
    OP1("cvt.rzi.s64.f32", s64, f32, integer<s64>(a))                                              \
    OP1("cvt.rzi.s32.f64", s32, f64, integer<s32>(a))                                              \
    OP1("cvt.rzi.u32.f64", u32, f64, integer<u32>(std::trunc(a)))                                  \
    OP1("cvt.rzi.s64.f64", s64, f64, integer<s64>(a))                                              \
    OP1("cvt.rni.s32.f32", s32, f32, integer<s32>(std::nearbyint(a)))                              \
    OP1("cvt.rni.f32.f32", f32, f32, std::nearbyint(a))                                            \
    OP1("cvt.rmi.f32.f32", f32, f32, std::floor(a))                                                \
    OP1("cvt.rmi.ftz.f32.f32", f32, f32, std::floor(ftz(a)))                                       \
    OP1("cvt.rpi.f32.f32", f32, f32, std::ceil(a))                                                 \
    OP1("cvt.rzi.f32.f32", f32, f32, std::trunc(a))                                                \
    OP1("cvt.rni.f64.f64", f64, f64, std::nearbyint(a))                                            \
    OP1("cvt.rmi.f64.f64", f64, f64, std::floor(a))                                                \
    OP1("cvt.rpi.f64.f64", f64, f64, std::ceil(a))                                                 \
    OP1("cvt.rzi.f64.f64", f64, f64, std::trunc(a))
