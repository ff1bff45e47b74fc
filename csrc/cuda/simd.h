// What csrc/simd.h is to the CPU's kernels, for those of a GPU: a vector is one number. In its place before the
// formulas that both share (csrc/vmath.h, csrc/*_formula.h).
#pragma once

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define SADCL_INLINE __device__ __forceinline__
#define SADCL_KERNELS_BEGIN namespace sadcl {
#define SADCL_KERNELS_END }

SADCL_KERNELS_BEGIN

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using V = float;
  using I = int32_t;
  static constexpr int kMantissa = 23;
};

template <>
struct Simd<double> {
  using V = double;
  using I = int64_t;
  static constexpr int kMantissa = 52;
};

template <class T>
using vec = typename Simd<T>::V;

template <class T>
SADCL_INLINE vec<T> splat(T x) {
  return x;
}
template <class T>
SADCL_INLINE vec<T> vmax(vec<T> a, vec<T> b) {
  return a > b ? a : b;
}
template <class T>
SADCL_INLINE bool any(bool set) {
  return set;
}

template <class T>
SADCL_INLINE typename Simd<T>::I bits_of(vec<T> x);
template <>
SADCL_INLINE int32_t bits_of<float>(float x) {
  return __float_as_int(x);
}
template <>
SADCL_INLINE int64_t bits_of<double>(double x) {
  return __double_as_longlong(x);
}
template <class T>
SADCL_INLINE vec<T> number_of(typename Simd<T>::I bits);
template <>
SADCL_INLINE float number_of<float>(int32_t bits) {
  return __int_as_float(bits);
}
template <>
SADCL_INLINE double number_of<double>(int64_t bits) {
  return __longlong_as_double(bits);
}
template <class T>
SADCL_INLINE vec<T> converted(typename Simd<T>::I integer) {
  return vec<T>(integer);
}

SADCL_KERNELS_END
