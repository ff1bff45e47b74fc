// Numbers as the instructions see them: bit casts, 16-bit floats, rounding, flushing, and the error of approximations.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

struct bf16 {
    u16 bits;
};
using f16 = _Float16;

inline bool subnormal(f32 x) { return x != 0 && std::fabs(x) < std::numeric_limits<f32>::min(); }
inline f32 ftz(f32 x) { return subnormal(x) ? std::copysign(0.0f, x) : x; }
inline f32 saturated(f32 x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }  // NaN becomes 0

inline f32 widened(bf16 x) { return std::bit_cast<f32>(u32(x.bits) << 16); }
inline f32 widened(f16 x) { return f32(x); }

// To the nearest, ties to even.
inline bf16 to_bf16(f32 x) {
    const u32 bits = std::bit_cast<u32>(x);
    if (x != x) return {0x7fff};
    return {u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// a + b as a double whose last bit says whether something was lost: a second rounding to fewer bits is then exact.
inline f64 odd_sum(f64 a, f64 b) {
    const f64 sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const f64 part = sum - a, lost = (a - (sum - part)) + (b - part);
    const u64 bits = std::bit_cast<u64>(sum);
    if (lost == 0 || (bits & 1)) return sum;
    return std::bit_cast<f64>(bits + (((lost > 0) == (sum > 0)) ? 1 : -1));
}
// A double whose last bit is odd where inexact, to float with the same property.
inline f32 odd_float(f64 x) {
    const f32 near = f32(x);
    if (!std::isfinite(near) || f64(near) == x) return near;
    const u32 bits = std::bit_cast<u32>(near);
    if (bits & 1) return near;
    return std::bit_cast<f32>(bits + ((std::fabs(x) > std::fabs(f64(near))) ? 1 : -1));
}
inline bf16 fma_bf16(bf16 a, bf16 b, bf16 c) {
    return to_bf16(odd_float(odd_sum(f64(widened(a)) * f64(widened(b)), f64(widened(c)))));
}
inline f16 fma_f16(f16 a, f16 b, f16 c) { return f16(odd_float(odd_sum(f64(a) * f64(b), f64(c)))); }
inline bf16 sum_bf16(bf16 a, bf16 b) { return to_bf16(odd_float(odd_sum(f64(widened(a)), f64(widened(b))))); }
inline bf16 product_bf16(bf16 a, bf16 b) { return to_bf16(widened(a) * widened(b)); }  // exact in float

// Towards zero.
inline f32 truncated(f64 x) {
    const f32 near = f32(x);
    if (!(std::fabs(f64(near)) > std::fabs(x))) return near;
    return std::bit_cast<f32>(std::bit_cast<u32>(near) - 1);
}

template <class F>
F smaller(F a, F b) {  // a NaN loses; -0 is below 0
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
template <class F>
F larger(F a, F b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a < b ? b : a;
}
template <class F>
F with_nan(F a, F b, F other) {
    return a != a || b != b ? std::numeric_limits<F>::quiet_NaN() : other;
}

// To an integer, saturated; NaN is 0.
template <class I, class F>
I integer(F x) {
    if (x != x) return 0;
    const F low = F(std::numeric_limits<I>::min()), high = std::ldexp(F(1), int(sizeof(I) * 8 - std::is_signed_v<I>));
    if (x >= high) return std::numeric_limits<I>::max();
    return x < low ? std::numeric_limits<I>::min() : I(x);
}

// How far the approximate instructions are off: a fraction in [-1, 1] of the documented bound, drawn from their operand.
struct Approximation {
    f64 scale = 1;
    u64 seed = 0;
};
inline Approximation approximation;
inline f64 off(u64 bits, f64 bound) {
    u64 h = (bits + approximation.seed * 0x9e3779b97f4a7c15u + 0x7f4a7c15u) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 31)) * 0x94d049bb133111ebu;
    const f64 drawn = f64(s64(h ^ (h >> 29))) * 0x1p-63;
    return approximation.scale * bound * drawn;
}
inline f32 approximate(f64 exact, f32 a, f64 bound) {
    return f32(exact * (1 + off(std::bit_cast<u32>(a), bound)));
}
// To the nearest after an error of so many units in the last place, less the half that the rounding is.
inline f32 approximate_ulps(f64 exact, f32 a, f32 b, f64 ulps) {
    if (!std::isfinite(exact) || exact == 0) return f32(exact);
    const f64 unit = std::ldexp(1.0, std::ilogb(exact) - 23);
    return f32(exact + off((u64(std::bit_cast<u32>(a)) << 32) | std::bit_cast<u32>(b), ulps - 0.5) * unit);
}
inline f32 exponential(f32 a) { return subnormal(a) || a == 0 ? 1.0f : approximate_ulps(std::exp2(f64(a)), a, 0, 2); }
// An absolute error in (0.5, 2), where the logarithm itself is small, else a relative one.
inline f32 logarithm(f32 a) {
    const f64 exact = std::log2(f64(a));
    if (!std::isfinite(exact)) return f32(exact);
    const f64 error = off(std::bit_cast<u32>(a), 0x1p-22);
    return f32(a > 0.5f && a < 2 ? exact + error : exact * (1 + error));
}
// The upper halves of operand and result alone; 20 bits of the mantissa.
inline f64 gross_reciprocal(f64 a) {
    const f64 seen = std::bit_cast<f64>(std::bit_cast<u64>(a) & 0xffffffff00000000u);
    if (std::fabs(seen) < std::numeric_limits<f64>::min()) return std::copysign(INFINITY, seen);
    f64 exact = 1 / seen;
    if (std::isfinite(exact)) exact *= 1 + off(std::bit_cast<u64>(seen), 0x1p-20);
    if (std::fabs(exact) < std::numeric_limits<f64>::min()) exact = std::copysign(0.0, exact);
    return std::bit_cast<f64>(std::bit_cast<u64>(exact) & 0xffffffff00000000u);
}

inline u32 permuted(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64(b) << 32) | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 pick = (selector >> (4 * i)) & 15;
        const u8 byte = u8(bytes >> (8 * (pick & 7)));
        result |= u32((pick & 8) ? ((byte & 0x80) ? 0xff : 0) : byte) << (8 * i);
    }
    return result;
}
template <class U>
U extracted(U a, u32 position, u32 length) {  // sign extended where U is signed
    using Bits = std::make_unsigned_t<U>;
    constexpr u32 size = sizeof(U) * 8;
    position &= 255, length &= 255;
    const Bits bits = Bits(a);
    Bits sign = 0;
    if (std::is_signed_v<U> && length > 0) {
        const u32 at = position + length - 1 < size - 1 ? position + length - 1 : size - 1;
        sign = (bits >> at) & 1;
    }
    Bits result = 0;
    for (u32 i = 0; i < size; ++i) {
        const bool bit = i < length && position + i < size ? (bits >> (position + i)) & 1 : sign;
        result |= Bits(bit) << i;
    }
    return U(result);
}
template <class U>
U turned(U a) {
    U result = 0;
    for (u32 i = 0; i < sizeof(U) * 8; ++i) result |= U(a >> i & 1) << (sizeof(U) * 8 - 1 - i);
    return result;
}
template <class U>
U inserted(U a, U into, u32 position, u32 length) {  // the low bits of a
    constexpr u32 size = sizeof(U) * 8;
    position &= 255, length &= 255;
    for (u32 i = 0; i < length && position + i < size && i < size; ++i) {
        const U bit = U(1) << (position + i);
        into = a >> i & 1 ? into | bit : into & ~bit;
    }
    return into;
}
template <class T>
T quotient(T a, T b) {  // unspecified by 0: all ones
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
    return a / b;
}
template <class T>
T remainder_of(T a, T b) {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return 0;
    return a % b;
}
template <class T>
T shifted_right(T a, u32 by) {
    constexpr u32 size = sizeof(T) * 8;
    if (by >= size) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return T(a >> by);
}
template <class T>
T shifted_left(T a, u32 by) {
    return by >= sizeof(T) * 8 ? T(0) : T(a << by);
}
