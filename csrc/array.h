// A borrowed strided tensor: what Python hands over as `_C.Array(data_ptr, dtype, shape, strides)`.
//
// This header is also seen by the per-ISA sources, so it holds plain data only (see isa.h on why no STL).
#pragma once
#include <stdint.h>

namespace sadcl {

enum DType : int { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3, kU8 = 4, kI8 = 5, kI16 = 6, kI32 = 7, kI64 = 8 };

constexpr int kMaxDims = 6;

struct Array {
  void* data = nullptr;
  DType dtype = kF32;
  int dims = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements; any sign, 0 for expanded dimensions
};

}  // namespace sadcl
