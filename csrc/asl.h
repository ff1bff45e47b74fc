// Arguments of the asymmetric loss, forward and backward.
// T is the accumulation type: double for float64 logits, else float.
#pragma once
#include "array.h"

namespace sadcl {

struct AslForward {
  Array logits;              // [B, C]
  Array labels;              // [B, C], any real dtype
  const void* class_weight;  // T [C], or null
  double gamma_neg, gamma_pos, clip, eps;
  bool detach_focal_weight;
  bool sum_classes;
  void* loss;   // T [B, C], or T [B] if sum_classes
  void* slope;  // T [B, C], or null if nothing will be differentiated
  int threads;
};

struct AslBackward {
  Array grad_loss;    // T [B, C], any strides (0 in dimension 1 for the sum over classes)
  const void* slope;  // T [B, C]
  Array grad_logits;  // [B, C] contiguous, logits' dtype
  int threads;
};

}  // namespace sadcl
