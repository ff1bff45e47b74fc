// Arguments of the image-level multi-label losses, forward and backward.
#pragma once
#include "array.h"
#include "sscl.h"

namespace sadcl {

// In the order of sadcl.portable.mlc.WEIGHTINGS; dense: weights are given.
// Of group_rows.h alone: ids, int32 [rows, 1] in place of labels; equal ones are positives.
enum MlcWeighting : int { kAll, kAny, kMulSupCon, kJaccard, kOverlap, kSimDis, kMsc, kDense, kIds };

// Where keys are rows of all ranks of a group (group_rows.h): what labels of a part of them do not say.
struct MlcPeers {
  int64_t own;                     // the key that is anchor 0, the next one is anchor 1; far below 0: none of them
  bool both;                       // keys are anchors, too
  const void* class_share;         // T [C], mulsupcon: what a partner in a class weighs
  const void *table, *table_back;  // T [N, C], [K, C], msc: the same of each anchor; null: 0
  Array weights_back;              // [N, K], dense: the weights of keys towards anchors
};

// The least I / U with U <= classes that is at least a threshold in float64: shares are compared as whole numbers,
// which float32 holds exactly to 4,096 classes. Rounded quotients of a share below and a threshold above it could be
// equal.
struct LeastShare {
  double shared = 1, of = 1;

  LeastShare() = default;
  LeastShare(double threshold, int64_t classes) {
    for (int64_t u = 1; u <= classes; ++u) {
      double i = __builtin_ceil(threshold * double(u)) - 1;
      if (i < 0) i = 0;
      while (i / double(u) < threshold) ++i;
      if (i * of < shared * double(u)) shared = i, of = double(u);
    }
  }
};

// T is the accumulation type: double for float64 features, else float. What is not there has no dimensions.
struct MlcInputs {
  Array features;                  // [B, V, D]
  Array labels, keys, key_labels;  // [B, C], [K, D], [K, C]
  Array prototypes, weights;       // [C, D], [N, columns]
  const void* class_weight;        // T [C], or null
  double temperature, alpha, beta;
  LeastShare least;  // of jaccard
  int weighting;
  bool include_batch, normalize;
  int threads;
  const MlcPeers* peers = nullptr;
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
