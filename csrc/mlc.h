// Arguments of the image-level multi-label losses, forward and backward.
#pragma once
#include "array.h"

namespace sadcl {

// In the order of sadcl.portable.mlc.WEIGHTINGS; dense: weights are given.
enum MlcWeighting : int { kAll, kAny, kMulSupCon, kJaccard, kOverlap, kSimDis, kMsc, kDense };

// T is the accumulation type: double for float64 features, else float. What is not there has no dimensions.
struct MlcInputs {
  Array features;                  // [B, V, D]
  Array labels, keys, key_labels;  // [B, C], [K, D], [K, C]
  Array prototypes, weights;       // [C, D], [N, columns]
  const void* class_weight;        // T [C], or null
  double temperature, threshold, alpha, beta;
  int weighting;
  bool include_batch, normalize;
  int threads;
};

struct MlcForward {
  MlcInputs in;
  void* row_loss;  // T [B, V]
  double* lse;     // [N]
  double* norm;    // [N + K + C]
};

struct MlcBackward {
  MlcInputs in;
  Array grad_rows;  // T [B, V], any strides
  const double *lse, *norm;
  Array grad_features, grad_keys, grad_prototypes;  // contiguous, features' dtype; no dimensions: not wanted
};

}  // namespace sadcl
