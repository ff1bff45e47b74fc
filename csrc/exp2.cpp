// simd.h's exponential over an array, so that a test can hold it against float64 on every instruction set.
#include "array.h"
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
void exp2_as(const Array& x, const Array& out) {
  const T* in = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(out.data);
  for (int64_t i = 0; i < x.shape[0]; ++i) to[i] = exp2<T>(splat(in[i]), Scale<T>(1))[0];
}

void exp2_array(const Array& x, const Array& out) { x.dtype == kF64 ? exp2_as<double>(x, out) : exp2_as<float>(x, out); }

SADCL_KERNELS_END
