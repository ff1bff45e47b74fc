// Words of bits as wide as T, by the vector, and how many of their bits are set.
#pragma once
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
struct Word;
template <>
struct Word<float> {
  typedef uint32_t S;
  typedef uint32_t V __attribute__((vector_size(kVecBytes)));
};
template <>
struct Word<double> {
  typedef uint64_t S;
  typedef uint64_t V __attribute__((vector_size(kVecBytes)));
};

// Bits set in every lane.
template <class T>
SADCL_INLINE typename Word<T>::V population(typename Word<T>::V x) {
#if defined(__AVX512VPOPCNTDQ__)
  if constexpr (sizeof(T) == 4) return (typename Word<T>::V)_mm512_popcnt_epi32((__m512i)x);
#endif
  typedef typename Word<T>::S S;
  constexpr S kOnes = S(~S(0));
  x = x - ((x >> 1) & (kOnes / 3));
  x = (x & (kOnes / 5)) + ((x >> 2) & (kOnes / 5));
  x = (x + (x >> 4)) & (kOnes / 17);
  return (x * (kOnes / 255)) >> (sizeof(S) * 8 - 8);
}

SADCL_KERNELS_END
