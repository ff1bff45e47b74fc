// Arguments of the image-level multi-label losses, forward and backward.
#pragma once
#include "array.h"
#include "sscl.h"

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

// What the forward keeps for the backward, T [kept_size]. With the batch among the columns [lam (N), share (N), of msc
// what classes weigh (N, C) if there is room, scores of anchors against anchors as in sscl.h]. Without it, where keys
// want no gradient, [1 if what follows is there, the gradient of N anchors by D]: one sweep over the keys gave it. Less
// than that, or nothing: the backward counts again.
static constexpr int64_t mlc_keep(int64_t n, int64_t width) {
  const int64_t rows = (n + kWidestPanel - 1) / kWidestPanel * kWidestPanel;
  const int64_t all = (rows + kBlockRows) * rows / 2 + kKeptHead, room = 7 * n * width / 2;
  return 2 * n + (all <= kFewScores || all <= room ? all : all <= 2 * room ? room : 0);
}
static constexpr int64_t mlc_keep_gradient(int64_t n, int64_t width) { return n * width + 1; }

struct MlcForward {
  MlcInputs in;
  void* row_loss;  // T [B, V]
  double* lse;     // [N]
  double* norm;    // [N + K + C]
  void* kept;
  int64_t kept_size;
};

struct MlcBackward {
  MlcInputs in;
  Array grad_rows;  // T [B, V], any strides
  const double *lse, *norm;
  const void* kept;
  int64_t kept_size;
  Array grad_features, grad_keys, grad_prototypes;  // contiguous, features' dtype; no dimensions: not wanted
};

}  // namespace sadcl
