// Vectors by the GCC/Clang vector extension: the width is a constant of the instruction set, the code is not.
#pragma once
#include <stdint.h>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>  // its functions are inline at every call: nothing of it reaches the linker
#endif

SADCL_KERNELS_BEGIN

#if defined(__AVX512F__)
constexpr int kVecBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVecBytes = 16, kRegisters = 32;
#else
constexpr int kVecBytes = 16, kRegisters = 16;
#endif

// V: a register of T; U: the same at any address; I: integers of T's width (also the type of V's comparisons).
// exp2 constants: q with 2^f = 1 + f q(f) on [-1/2, 1/2], fitted at Chebyshev nodes (relative error 5e-9 and 3e-19).
template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef float U __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int kLanes = kVecBytes / 4, kMantissa = 23, kMinExponent = -126, kMaxExponent = 127;
  static constexpr float kRound =
      12582912.f + 127;  // 1.5 * 2^23 + bias: adding it leaves round(t) + bias in the low bits
  static constexpr int kDegree = 6;
  static constexpr float kExp2[kDegree] = {6.931471805880262287811e-01f, 2.4022650760568126949e-01f,
                                           5.5503571142190778496e-02f,   9.618082557277853984e-03f,
                                           1.3390863364671216092e-03f,   1.5453162945119447715e-04f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef double U __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int kLanes = kVecBytes / 8, kMantissa = 52, kMinExponent = -1022, kMaxExponent = 1023;
  static constexpr double kRound = 6755399441055744. + 1023;
  static constexpr int kDegree = 12;
  static constexpr double kExp2[kDegree] = {
      6.931471805599453092e-01,  2.4022650695910071219e-01, 5.5504108664821617847e-02, 9.6181291076284757446e-03,
      1.3333558146409453853e-03, 1.5403530393387548419e-04, 1.5252733838428233177e-05, 1.3215486794835187774e-06,
      1.0178058403339878352e-07, 7.0549015230625912787e-09, 4.4556257453473822973e-10, 2.5724928414724071815e-11};
};

template <class T>
using vec = typename Simd<T>::V;

template <class T>
SADCL_INLINE vec<T> load(const T* p) {  // aligned
  return *reinterpret_cast<const vec<T>*>(p);
}
template <class T>
SADCL_INLINE vec<T> loadu(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
SADCL_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<vec<T>*>(p) = v;
}
template <class T>
SADCL_INLINE void storeu(T* p, vec<T> v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}
// Stores zeros past the caches (64 bytes at a 64-byte address); stream_end() before others may look.
SADCL_INLINE void stream_zeros(char* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), _mm512_setzero_ps());
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) _mm256_stream_ps(reinterpret_cast<float*>(p + i), _mm256_setzero_ps());
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) _mm_stream_ps(reinterpret_cast<float*>(p + i), _mm_setzero_ps());
#else
  __builtin_memset(p, 0, 64);
#endif
}
template <class T>
SADCL_INLINE void stream(T* p, vec<T> v) {  // to an address as aligned as a register is wide
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  store(p, v);
#endif
}
SADCL_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
SADCL_INLINE vec<T> splat(T x) {
  return x - vec<T>{};  // not 0 + x: that turns -0 into 0, so compilers really add
}
template <class T>
SADCL_INLINE T sum(const vec<T>& v) {  // pairwise, so that the order is the same for every width's lanes
  T part[Simd<T>::kLanes];
  for (int l = 0; l < Simd<T>::kLanes; ++l) part[l] = v[l];
  for (int step = Simd<T>::kLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) part[l] += part[l + step];
  return part[0];
}

// a where a > b, else b: a NaN in `a` loses. Who needs NaN to survive gets it from the sums.
template <class T>
SADCL_INLINE vec<T> vmax(vec<T> a, vec<T> b) {
  return a > b ? a : b;
}

// The bits of numbers, numbers of bits, and integers as numbers.
template <class T>
SADCL_INLINE typename Simd<T>::I bits_of(vec<T> x) {
  return (typename Simd<T>::I)x;
}
template <class T>
SADCL_INLINE vec<T> number_of(typename Simd<T>::I bits) {
  return (vec<T>)bits;
}
template <class T>
SADCL_INLINE vec<T> converted(typename Simd<T>::I integer) {
  return __builtin_convertvector(integer, vec<T>);
}

// Is any lane of a comparison set?
template <class T>
SADCL_INLINE bool any(const typename Simd<T>::I& mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t part[kVecBytes / 8], all = 0;
  __builtin_memcpy(part, &mask, sizeof part);
  for (uint64_t p : part) all |= p;
  return all != 0;
#endif
}

// A factor in two parts: rounded to float alone, log2(e) / temperature would shift every score by up to 3e-8 of itself,
// all in the same direction.
template <class T>
struct Scale {
  T high, low;
  explicit Scale(double value) : high(T(value)), low(T(value - double(high))) {}
};

// 2^(x scale). With FMA the product is never rounded to T (the reduced argument f is exact but for its last bit), so
// the result is off by at most 1 ulp however large the product; without FMA by 1.5 ulp plus the product's rounding
// (tests/test_cpp_sscl.py measures both). Below the smallest normal number exactly 0, so -inf serves as "not there";
// NaN stays NaN. The product must not reach kMaxExponent + 1/2.
template <class T>
SADCL_INLINE vec<T> exp2(vec<T> x, Scale<T> scale) {
  using S = Simd<T>;
  const vec<T> shifted = x * scale.high + S::kRound;
  const vec<T> whole = shifted - S::kRound;
  const vec<T> f = x * scale.low + (x * scale.high - whole);
  vec<T> p = splat<T>(S::kExp2[S::kDegree - 1]);
#pragma GCC unroll 16
  for (int i = S::kDegree - 2; i >= 0; --i) p = p * f + S::kExp2[i];
  p = p * f + T(1);
  const vec<T> power = (vec<T>)((typename S::I)shifted << S::kMantissa);
  return whole < T(S::kMinExponent) ? vec<T>{} : p * power;
}

// --- bfloat16 dot products ---

// Two bfloat16 of one row, neighbours in depth: what AVX512_BF16's instruction multiplies and adds in one step.
struct Pair {
  uint32_t bits;
};

// Terms of a sum that one step over elements E adds.
template <class E>
inline constexpr int kTerms = 1;
template <>
inline constexpr int kTerms<Pair> = 2;

// SADCL_BF16_PAIRS compiles the same for any instruction set, out of shifts and FMAs: to test on processors without it.
#if defined(__AVX512BF16__) || defined(SADCL_BF16_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

typedef Simd<float>::I PairVec;
typedef Simd<float>::V FloatVec;

SADCL_INLINE PairVec load(const Pair* p) {  // whatever type they were written as
  typedef int32_t Any __attribute__((vector_size(kVecBytes), may_alias));
  return *reinterpret_cast<const Any*>(p);
}
SADCL_INLINE PairVec splat(Pair x) { return PairVec{} + int32_t(x.bits); }

// The numbers of a pair, and two numbers rounded to one (to nearest, ties to even; a subnormal may become 0).
SADCL_INLINE FloatVec even_of(PairVec x) { return FloatVec(x << 16); }
SADCL_INLINE FloatVec odd_of(PairVec x) { return FloatVec(x & int32_t(0xffff0000u)); }
SADCL_INLINE PairVec pair_of(FloatVec even, FloatVec odd) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(kVecBytes / 2)));
  const Halves low = (Halves)_mm512_cvtneps_pbh(__m512(even)), high = (Halves)_mm512_cvtneps_pbh(__m512(odd));
  return __builtin_convertvector(low, PairVec) | __builtin_convertvector(high, PairVec) << 16;
#else
  PairVec x = PairVec(even), y = PairVec(odd);
  x = even == even ? ((x + 0x7fff + ((x >> 16) & 1)) >> 16) & 0xffff : PairVec{} + 0x7fc0;
  y = odd == odd ? (y + 0x7fff + ((y >> 16) & 1)) & int32_t(0xffff0000u) : PairVec{} + 0x7fc00000;
  return x | y;
#endif
}
SADCL_INLINE void store(Pair* p, PairVec v) {
  typedef int32_t Any __attribute__((vector_size(kVecBytes), may_alias));
  *reinterpret_cast<Any*>(p) = v;
}

template <class T>
SADCL_INLINE vec<T> add_product(vec<T> sum, vec<T> x, vec<T> y) {
  return sum + x * y;
}
template <class T>
SADCL_INLINE FloatVec add_product(FloatVec sum, PairVec x, PairVec y) {
#if defined(__AVX512BF16__)
  return FloatVec(_mm512_dpbf16_ps(__m512(sum), (__m512bh)x, (__m512bh)y));
#else
  sum += odd_of(x) * odd_of(y);
  return sum + even_of(x) * even_of(y);
#endif
}

SADCL_KERNELS_END
