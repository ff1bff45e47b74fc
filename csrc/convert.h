// Storage types: reading a strided row as T, writing a contiguous row of the features' dtype.
#pragma once
#include <string.h>

#include "array.h"
#include "isa.h"
#include "simd.h"

SADCL_KERNELS_BEGIN

SADCL_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
SADCL_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SADCL_INLINE float widen(float x) { return x; }
SADCL_INLINE double widen(double x) { return x; }
SADCL_INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// Branch-free, so the loops around it vectorise. Subnormals go through a subtraction of normal numbers and hence
// survive torch.set_flush_denormal(True).
SADCL_INLINE float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t rebased = magnitude + (112u << 23);
  const uint32_t special = rebased + (112u << 23);  // inf and NaN: exponent 255
  const uint32_t tiny = to_bits(from_bits(rebased + (1u << 23)) - from_bits(113u << 23));
  const uint32_t bits = exponent == 0x0f800000u ? special : exponent == 0 ? tiny : rebased;
  return from_bits(bits | (uint32_t(x.bits & 0x8000) << 16));
}

SADCL_INLINE void narrow(float x, float* out) { *out = x; }
SADCL_INLINE void narrow(double x, double* out) { *out = x; }

// Round to nearest, ties to even.
SADCL_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
SADCL_INLINE void narrow(float x, Float16* out) {
  const uint32_t bits = to_bits(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and up: inf, or NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 aligns the subnormal's last bit
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(half | (sign >> 16));
}

#ifdef __F16C__
// The same bits by instruction, whatever the denormal flags say: 16 or 8 elements at a time of contiguous rows.
#ifdef __AVX512F__
constexpr int64_t kHalves = 16;
SADCL_INLINE void widen_halves(const Float16* x, float* out) {
  _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}
SADCL_INLINE void narrow_halves(const float* x, Float16* out) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(_mm512_loadu_ps(x), kNearest));
}
#else
constexpr int64_t kHalves = 8;
SADCL_INLINE void widen_halves(const Float16* x, float* out) {
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
SADCL_INLINE void narrow_halves(const float* x, Float16* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT));
}
#endif
SADCL_INLINE int64_t widen_most(const Float16* x, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + kHalves <= n; d += kHalves) widen_halves(x + d, out + d);
  return d;
}
SADCL_INLINE int64_t narrow_most(const float* x, int64_t n, Float16* out) {
  int64_t d = 0;
  for (; d + kHalves <= n; d += kHalves) narrow_halves(x + d, out + d);
  return d;
}
#else
SADCL_INLINE int64_t widen_most(const Float16*, int64_t, float*) { return 0; }
SADCL_INLINE int64_t narrow_most(const float*, int64_t, Float16*) { return 0; }
#endif
template <class S, class T>
SADCL_INLINE int64_t widen_most(const S*, int64_t, T*) {
  return 0;
}

template <class S, class T>
SADCL_INLINE void read_row_as(const S* __restrict__ x, int64_t stride, int64_t n, T* __restrict__ out) {
  if (stride == 1) {
    for (int64_t d = widen_most(x, n, out); d < n; ++d) out[d] = widen(x[d]);
  } else {
    for (int64_t d = 0; d < n; ++d) out[d] = widen(x[d * stride]);
  }
}

// out[d] = element `offset + d * stride` of the array.
inline void read_row(const Array& a, int64_t offset, int64_t stride, int64_t n, float* out) {
  switch (a.dtype) {
    case kBF16: return read_row_as(static_cast<const BFloat16*>(a.data) + offset, stride, n, out);
    case kF16: return read_row_as(static_cast<const Float16*>(a.data) + offset, stride, n, out);
    default: return read_row_as(static_cast<const float*>(a.data) + offset, stride, n, out);
  }
}
inline void read_row(const Array& a, int64_t offset, int64_t stride, int64_t n, double* out) {
  read_row_as(static_cast<const double*>(a.data) + offset, stride, n, out);
}

// A register of a contiguous row, widened.
template <class T>
SADCL_INLINE vec<T> widened(const T* x) {
  return loadu(x);
}
SADCL_INLINE vec<float> widened(const BFloat16* x) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return vec<float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return vec<float>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  vec<float> out{};
  for (int i = 0; i < Simd<float>::kLanes; ++i) out[i] = widen(x[i]);
  return out;
#endif
}
SADCL_INLINE vec<float> widened(const Float16* x) {
  float out[Simd<float>::kLanes] = {};
#ifdef __F16C__
  static_assert(kHalves == Simd<float>::kLanes, "a register of float32");
  widen_halves(x, out);
#else
  for (int i = 0; i < Simd<float>::kLanes; ++i) out[i] = widen(x[i]);
#endif
  return loadu(out);
}

inline void write_row(void* data, DType dtype, int64_t offset, int64_t n, const float* x) {
  if (dtype == kBF16) {
    BFloat16* out = static_cast<BFloat16*>(data) + offset;
    for (int64_t d = 0; d < n; ++d) narrow(x[d], out + d);
  } else if (dtype == kF16) {
    Float16* out = static_cast<Float16*>(data) + offset;
    for (int64_t d = narrow_most(x, n, out); d < n; ++d) narrow(x[d], out + d);
  } else {
    memcpy(static_cast<float*>(data) + offset, x, n * sizeof(float));
  }
}
inline void write_row(void* data, DType, int64_t offset, int64_t n, const double* x) {
  memcpy(static_cast<double*>(data) + offset, x, n * sizeof(double));
}

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case kF64:
    case kI64: return 8;
    case kF32:
    case kI32: return 4;
    case kBF16:
    case kF16:
    case kI16: return 2;
    default: return 1;
  }
}

SADCL_KERNELS_END
