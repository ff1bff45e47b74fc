// Arguments of the two-way loss, forward and backward. T is the accumulation type: double for float64 logits, else
// float.
#pragma once
#include "array.h"

namespace sadcl {

struct TwoWayInputs {
  Array logits;  // [B, C]
  Array labels;  // [B, C], any real dtype
  double positive_temperature, negative_temperature;
  int threads;
};

struct TwoWayForward {
  TwoWayInputs in;
  void* row_loss;     // T [B]
  void* class_loss;   // T [C]
  double* row_lse;    // [2, B]: negatives, positives
  double* class_lse;  // [2, C]
};

struct TwoWayBackward {
  TwoWayInputs in;
  Array grad_rows, grad_classes;  // T [B], T [C], any stride; no dimensions where nobody used them
  const double *row_lse, *class_lse;
  Array grad_logits;  // [B, C] contiguous, logits' dtype
};

}  // namespace sadcl
