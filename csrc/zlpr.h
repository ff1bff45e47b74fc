// Arguments of ZLPR, forward and backward. T is the accumulation type: double for float64 logits, else float.
#pragma once
#include "array.h"

namespace sadcl {

struct ZlprForward {
  Array logits;    // [B, C]
  Array labels;    // [B, C], any real dtype
  void* row_loss;  // T [B]
  double* lse;     // [2, B]: negatives, positives
  int threads;
};

struct ZlprBackward {
  Array logits, labels;
  Array grad_rows;  // T [B], any stride
  const double* lse;
  Array grad_logits;  // [B, C] contiguous, logits' dtype
  int threads;
};

}  // namespace sadcl
