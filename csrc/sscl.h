// Arguments of the sample-to-sample contrastive loss, forward and backward.
#pragma once
#include "array.h"

namespace sadcl {

// Active rows of `features [B, V, C, D]`: compact row i = p * V + v is feature row (pairs[p] / C, v, pairs[p] % C).
// Classes are the segments class_ptr[k] <= p < class_ptr[k + 1], k < num_classes.
struct SsclRows {
  Array features;
  const int32_t* pairs;
  const int32_t* class_ptr;
  int64_t num_classes;
  int64_t capacity;  // entries of `pairs`; class_ptr[num_classes] of them are active
  double temperature;
  bool normalize;
  int threads;
};

// Outputs arrive uninitialised. T is the accumulation type: double for float64 features, else float.
struct SsclForward {
  SsclRows rows;
  bool released;
  void* row_loss;  // T [B, V, C]
  void* lse;       // T [V * capacity]
  double* norm;    // [V * capacity]
  void* tile;      // T [tile_size]: holds the N x N products z_i.z_j if they fit
  int64_t tile_size;
};

struct SsclBackward {
  SsclRows rows;
  Array grad_rows;  // T [B, V, C], any strides
  const void* lse;
  const double* norm;
  const void* tile;
  int64_t tile_size;
  Array grad_features;  // [B, V, C, D] of features' dtype; all of it contiguous, or each view is (the dual loss)
  bool add_to_first;    // view 0 holds another gradient already, to be added to; needs the layout with whole views
};

}  // namespace sadcl
