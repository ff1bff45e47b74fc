// What the kernels share: 16-bit numbers, reads of any dtype, sums of a block in a fixed order.
#pragma once
#include "simd.h"

extern __shared__ __align__(16) unsigned char shared_memory[];

SADCL_KERNELS_BEGIN

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffffu;
SADCL_INLINE double infinity() { return __longlong_as_double(0x7ff0000000000000); }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Any element as a number to compute with: float for what fits it, else double.
SADCL_INLINE float widen(bf16 x) { return __int_as_float(int32_t(uint32_t(x.bits) << 16)); }
SADCL_INLINE float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
SADCL_INLINE float widen(float x) { return x; }
SADCL_INLINE double widen(double x) { return x; }
SADCL_INLINE float widen(uint8_t x) { return float(int32_t(x)); }
SADCL_INLINE float widen(int8_t x) { return float(int32_t(x)); }
SADCL_INLINE float widen(int16_t x) { return float(int32_t(x)); }
SADCL_INLINE double widen(int32_t x) { return double(x); }
SADCL_INLINE double widen(int64_t x) { return double(x); }

// A number rounded to what is stored, to nearest even. From double it is rounded once: by way of a float that is
// rounded to odd.
template <class T>
struct Narrow {
  static SADCL_INLINE T of(double x) { return T(x); }
};
SADCL_INLINE float to_odd(double x) {
  const float near = __double2float_rn(x);
  if (double(near) == x || near != near) return near;
  const int32_t bits = __float_as_int(near);
  return __int_as_float((fabs(double(near)) > fabs(x) ? bits - 1 : bits) | 1);
}
template <>
struct Narrow<bf16> {
  static SADCL_INLINE bf16 of(float x) {
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
  }
  static SADCL_INLINE bf16 of(double x) { return of(to_odd(x)); }
};
template <>
struct Narrow<f16> {
  static SADCL_INLINE f16 of(float x) {
    f16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
  }
  static SADCL_INLINE f16 of(double x) { return of(to_odd(x)); }
};
template <class T, class S>
SADCL_INLINE T narrow(S x) {
  return Narrow<T>::of(x);
}

// Losses and statistics: float, for double double.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

// A label as a target: 1 active, -1 ignored, 0 else.
template <class L>
SADCL_INLINE int target_of(L label) {
  const auto y = widen(label);
  return y == 1 ? 1 : y == -1 ? -1 : 0;
}

SADCL_INLINE int lane() { return threadIdx.x % kWarp; }
SADCL_INLINE int warp() { return threadIdx.x / kWarp; }

// Sums and maxima over a warp: every lane gets it. The order of additions is a tree's, always the same.
template <class T>
SADCL_INLINE T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
template <class T>
SADCL_INLINE T warp_max(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over a block of kThreads, given to every thread; `scratch` holds kThreads / 32 numbers, and is free again.
template <int kThreads, class T>
SADCL_INLINE T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

SADCL_KERNELS_END
