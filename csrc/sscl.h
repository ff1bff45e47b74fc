// Arguments of the sample-to-sample contrastive loss, forward and backward.
#pragma once
#include "array.h"

namespace sadcl {

constexpr int64_t kFewScores = 1 << 18;  // of few rows: all n x n fit a cache (1 MB of float32)
constexpr int kBlockRows = 192;          // of many rows: a block of scores is at most this high and wide
constexpr int kWidestPanel = 48;         // rows of a block come in panels of a divisor of this
constexpr int kKeptHead = 16;            // at most: what stands before the blocks that are kept

// How many scores of n rows of `width` features the forward should keep for the backward. Those of few rows always; of
// more rows, the blocks on and above the diagonal, all or half of them, as far as they take 3.5 times the rows' own
// memory: all of them up to n = 7 width, 3 n^2 width flops instead of 4, and memory stays linear in n.
// (static: an inline function must not be seen by the linker, isa.h says why.)
static constexpr int64_t sscl_keep(int64_t n, int64_t width) {
  if (n * n <= kFewScores) return n * n;
  const int64_t rows = (n + kWidestPanel - 1) / kWidestPanel * kWidestPanel;
  const int64_t all = (rows + kBlockRows) * rows / 2 + kKeptHead, room = 7 * n * width / 2;
  return all <= room ? all : all <= 2 * room ? room : 0;
}

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
  bool rounded;  // bfloat16 rows, where the processor multiplies them: the gradient's weights may be rounded, too
  int threads;
};

// Outputs arrive uninitialised. T is the accumulation type: double for float64 features, else float.
struct SsclForward {
  SsclRows rows;
  bool released;
  void* row_loss;  // T [B, V, C]
  void* lse;     // T [2, V * capacity]: pivot and log-sum, lse = pivot / temperature + log-sum; +inf without a positive
  double* norm;  // [V * capacity]
  void* kept;    // T [kept_size]: products z_i.z_j for the backward, as many as there is room for
  int64_t kept_size;
};

struct SsclBackward {
  SsclRows rows;
  Array grad_rows;  // T [B, V, C], any strides
  const void* lse;
  const double* norm;
  const void* kept;
  int64_t kept_size;
  Array grad_features;  // [B, V, C, D] of features' dtype; all of it contiguous, or each view is (the dual loss)
  bool add_to_first;    // view 0 holds another gradient already, to be added to; needs the layout with whole views
};

}  // namespace sadcl
