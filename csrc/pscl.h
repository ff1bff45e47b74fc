// Arguments of the prototype-to-sample contrastive loss.
// T is the accumulation type: double for float64 features, else float.
#pragma once
#include "array.h"

namespace sadcl {

struct PsclForward {
  Array features;        // [B, C, D]
  Array prototypes;      // [C, D]
  const int8_t* target;  // [B, C]: 1 positive, 0 negative, -1 ignored
  double temperature;
  bool released;
  void* class_loss;  // T [C]
  double* score;     // [B, C]
  double* norm_x;    // [B, C]
  double* norm_p;    // [C]
  double* lse;       // [2, C]: over all images, over the positive ones
  int threads;
};

struct PsclBackward {
  Array grad_class_loss;  // T [C]
  Array features, prototypes;
  const int8_t* target;
  double temperature;
  bool released;
  const double *score, *norm_x, *norm_p, *lse;
  void* grad_features;    // [B, C, D], features' dtype
  void* grad_prototypes;  // [C, D], prototypes' dtype
  int threads;
};

}  // namespace sadcl
