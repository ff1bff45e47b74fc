// Arguments of the group-wise classifier. T is the accumulation type: double for float64 inputs, else float.
#pragma once
#include "array.h"

namespace sadcl {

struct GroupClassifierForward {
  Array features;    // [B, C, E]
  Array weight;      // [C, E]
  const void* bias;  // T [C]
  void* logits;      // T [B, C]
  int threads;
};

struct GroupClassifierBackward {
  Array grad_logits;  // T [B, C], any strides
  Array features, weight;
  void* grad_features;  // [B, C, E], features' dtype; null: not wanted
  void* grad_weight;    // [C, E], weight's dtype; null: not wanted
  int threads;
};

}  // namespace sadcl
