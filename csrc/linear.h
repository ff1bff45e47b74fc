// Arguments of one matrix product: out = left right (+ bias).
// T is the accumulation type: double for float64, else float.
#pragma once
#include "array.h"

namespace sadcl {

struct Linear {
  Array left;   // [M, K], any strides
  Array right;  // [K, N], any strides
  Array bias;   // [N], or no data
  void* out;    // T [M, N]
  int threads;
};

}  // namespace sadcl
