// exp, log and log1p on vectors, without libm: a lane's bits depend on its number alone, not on its place or
// neighbours. They do depend on the instruction set (with FMA or without) and on the compiler. On a GPU, where simd.h
// is csrc/cuda's, a vector is one number.
//
// Polynomials interpolate at Chebyshev nodes; the fit's relative error (in parentheses) is well under half an ulp, the
// rest is rounding. Bounds hold without FMA too; tests/test_cpp_asl.py holds what the ops make of them: a sigmoid
// within 4 ulp and its logarithm within 5, however small they are.
#pragma once
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
struct Math;

template <>
struct Math<float> {
  static constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMinExp = -87.33654f;  // log of the smallest normal number
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves round(t) in the low bits
  static constexpr int kBias = 127;
  static constexpr int kExpTerms = 5, kLogTerms = 3, kLog1pTerms = 5;
  // exp(r) = 1 + r + r^2 e(r), |r| <= log(2) / 2 (8e-9)
  static constexpr float kExp[kExpTerms] = {0.5f, 0.166665769897f, 0.0416665546172f, 0.00836317905272f,
                                            0.00139261835877f};
  // atanh(s) / s = 1 + t a(t), t = s^2: up to 0.0295 (3e-9) and up to 1/9 (4e-10)
  static constexpr float kLog[kLogTerms] = {0.333333425477f, 0.199943788583f, 0.14790492965f};
  static constexpr float kLog1p[kLog1pTerms] = {0.333333336603f, 0.19999853166f, 0.142961789972f, 0.108532879004f,
                                                0.11612164612f};
};

template <>
struct Math<double> {
  static constexpr double kLog2E = 1.4426950408889634074, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kMinExp = -708.3964185322641;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kRound = 6755399441055744.;
  static constexpr int kBias = 1023;
  static constexpr int kExpTerms = 10, kLogTerms = 7, kLog1pTerms = 10;
  static constexpr double kExp[kExpTerms] = {// (1e-17)
                                             0.5,
                                             0.16666666666666667453,
                                             0.041666666666624127873,
                                             0.0083333333333300618325,
                                             0.0013888888917213716901,
                                             0.00019841269863053616878,
                                             0.000024801521295954375131,
                                             2.7557268459997064772e-6,
                                             2.7620088445409748161e-7,
                                             2.5100385495510319078e-8};
  static constexpr double kLog[kLogTerms] = {// (5e-18)
                                             0.33333333333333348538, 0.19999999999949445257,  0.14285714313126918803,
                                             0.11111105544689748107, 0.090914462162684356003, 0.076658058610275039426,
                                             0.073089035767086624822};
  static constexpr double kLog1p[kLog1pTerms] = {
      // (5e-18)
      0.33333333333333329281,  0.20000000000007291337,  0.14285714283554378581,  0.11111111358713931495,
      0.090908947180664290846, 0.076927850324793115517, 0.066570721048274680752, 0.060005364047953562676,
      0.044003692430723369411, 0.080820228059717661105};
};

template <class T, int N>
SADCL_INLINE vec<T> polynomial(const T (&coefficient)[N], vec<T> x) {
  vec<T> p = splat<T>(coefficient[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * x + coefficient[i];
  return p;
}

// e^x for x <= 88 (double: 709), at most 1 ulp off; exactly 0 below the smallest normal number; NaN stays NaN.
template <class T>
SADCL_INLINE vec<T> exp(vec<T> x) {
  using M = Math<T>;
  const vec<T> shifted = x * M::kLog2E + (M::kRound + M::kBias);
  const vec<T> n = shifted - (M::kRound + M::kBias);
  const vec<T> r = (x - n * M::kLn2High) - n * M::kLn2Low;
  const vec<T> p = polynomial<T>(M::kExp, r) * (r * r) + r + T(1);
  const vec<T> scale = number_of<T>(bits_of<T>(shifted) << Simd<T>::kMantissa);
  return x < M::kMinExp ? vec<T>{} : p * scale;
}

// 2 atanh(s) with t = s^2 already there.
template <class T, int N>
SADCL_INLINE vec<T> twice_atanh(const T (&coefficient)[N], vec<T> s) {
  const vec<T> twice = s + s, t = s * s;
  return polynomial<T>(coefficient, t) * t * twice + twice;
}

// A positive number as 2^exponent * (1 + fraction), 1 + fraction in [sqrt(1/2), sqrt(2)). 0 and subnormal numbers come
// out as 2^-127 (double: 2^-1023).
template <class T>
struct Split {
  vec<T> exponent, fraction;
  SADCL_INLINE explicit Split(vec<T> x) {
    using I = typename Simd<T>::I;
    const I bits = bits_of<T>(x);
    const I k = (bits - Math<T>::kSqrtHalf) >> Simd<T>::kMantissa;
    exponent = converted<T>(k);
    fraction = number_of<T>(bits - (k << Simd<T>::kMantissa)) - T(1);
  }
};

// Logarithm of the split number, given s = fraction / (2 + fraction): at most 2 ulp off.
template <class T>
SADCL_INLINE vec<T> log_of(const Split<T>& split, vec<T> s) {
  return split.exponent * Math<T>::kLn2High + (split.exponent * Math<T>::kLn2Low + twice_atanh<T>(Math<T>::kLog, s));
}

// Logarithm of a positive number; 0 and subnormal numbers give that of the smallest normal one or so; NaN stays NaN.
template <class T>
SADCL_INLINE vec<T> log(vec<T> x) {
  const Split<T> split(x);
  return x != x ? x : log_of<T>(split, split.fraction / (split.fraction + T(2)));
}

// log(1 + e) for 0 <= e <= 1, given s = e / (2 + e): at most 3 ulp off, however small e is.
template <class T>
SADCL_INLINE vec<T> log1p_of(vec<T> s) {
  return twice_atanh<T>(Math<T>::kLog1p, s);
}

SADCL_KERNELS_END
