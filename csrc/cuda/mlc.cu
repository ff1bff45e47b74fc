// Image-level multi-label contrastive losses whose pair weights follow from labels, in one launch each way.
//
// Labels are packed once; a pair's weight is then some population counts, made where its score is. The forward carries
// five sums of an anchor over tiles of columns: highest score, sum of exponentials against it, sum f s, sum f,
// positives, W_ij = share_i f_ij. The backward counts pairs again, from labels alone, and then is SSCL's: one symmetric
// matrix of G_ij + G_ji over anchors and keys.
//
// Defines: X (vectors), LABELS (type), WEIGHTING (as sadcl.portable.mlc.WEIGHTINGS), NORMALIZE.
#include "labels.h"
#include "mlc_formula.h"
#include "pair_gradient.h"

SADCL_KERNELS_BEGIN

constexpr int kAllEqual = 0, kAny = 1, kJaccard = 3, kOverlap = 4, kSimDis = 5;

struct MlcSizes {
  int64_t images, views, keys, depth, classes;
  int64_t first;                   // column: 0 if the rows are columns, else the first key
  int64_t numerator, denominator;  // the threshold
  int64_t features[3], of_keys[2], labels[2], key_labels[2], upstream[2];
};

// Vectors are numbered anchors, then keys; rows of labels images, then keys.
struct Problem {
  LabelWords words;
  int anchors, views, images, first, numerator, denominator;

  SADCL_INLINE Problem(uint64_t* at, const MlcSizes& s)
      : words{at, int(s.classes + 63) / 64, int(s.images + s.keys)}, anchors(int(s.images * s.views)),
        views(int(s.views)), images(int(s.images)), first(int(s.first)), numerator(int(s.numerator)),
        denominator(int(s.denominator)) {}
  SADCL_INLINE int label_row(int i) const { return i < anchors ? i / views : images + i - anchors; }
};

// f_ij, f_ji, and whether j is a positive of i.
struct Weight {
  float forth, back;
  bool positive;
};
SADCL_INLINE Weight weight_of(const Problem& p, int i, int j) {
  const Counts c = counts_of(p.words, p.label_row(i), p.label_row(j));
  const int either = c.both + c.first + c.second;
  const float both = float(c.both), own = float(c.both + c.first), theirs = float(c.both + c.second);
  Weight w;
  if (WEIGHTING == kAllEqual) w.positive = c.known && c.first == 0 && c.second == 0;
  else if (WEIGHTING == kJaccard) w.positive = either > 0 && c.both * p.denominator >= either * p.numerator;
  else w.positive = c.both > 0;
  if (WEIGHTING == kAllEqual || WEIGHTING == kAny) w.forth = 1;
  else if (WEIGHTING == kSimDis) w.forth = similarity_of<float>(both, own, theirs);
  else w.forth = overlap_of<float>(both, float(either));
  w.forth = w.positive ? w.forth : 0;
  w.back = WEIGHTING == kSimDis ? similarity_of<float>(both, theirs, own) : w.forth;
  return w;
}
// Of sums of f and of positives: what f is multiplied by.
SADCL_INLINE double share_of(double sum, double count) { return 1 / (WEIGHTING == kOverlap ? sum : count); }

// Unit vectors and words of labels; `known` norms, or null. `norm_of(i)`: where norm i goes, or null.
SADCL_INLINE void stage(const Rows<X>& rows, const Problem& p, const MlcSizes& s, const X* features, const X* keys,
                        const LABELS* labels, const LABELS* key_labels, const double* known, bool seen,
                        const double* lse, double* norm) {
  for (int i = first_row_of_warp(); i < rows.n; i += all_warps()) {
    const bool anchor = i < p.anchors;
    const X* x = anchor ? features + i / p.views * s.features[0] + i % p.views * s.features[1]
                        : keys + (i - p.anchors) * s.of_keys[0];
    const int64_t stride = anchor ? s.features[2] : s.of_keys[1];
    // What no loss saw may hold anything: it is not read, and receives 0.
    const bool visible = seen && (p.first == 0 || !anchor || !known || lse[i] != infinity());
    const double length =
        stage_vector<X, NORMALIZE>(rows, x, stride, int(s.depth), i, known != nullptr, known && visible ? known[i] : 0);
    if (norm && lane() == 0) norm[i] = length;
  }
  for (int row = first_row_of_warp(); row < p.words.rows; row += all_warps()) {
    const bool image = row < p.images;
    pack_labels(p.words, row, image ? labels + row * s.labels[0] : key_labels + (row - p.images) * s.key_labels[0],
                image ? s.labels[1] : s.key_labels[1], int(s.classes));
  }
}

#ifdef KERNEL_mlc_forward
enum Sum { kHighest, kExponentials, kScores, kWeights, kPositives };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    mlc_forward(const X* features, const X* keys, const LABELS* labels, const LABELS* key_labels,
                const float* temperature, float* row_loss, double* lse, double* norm, X* z, uint64_t* words,
                float* scratch, uint32_t* barrier, MlcSizes s) {
  const Problem p(words, s);
  const Rows<X> rows(z, scratch, p.anchors + int(s.keys), int(s.depth));
  const int row_tiles = (p.anchors + kTile - 1) / kTile, column_tiles = (rows.n - p.first + kTile - 1) / kTile;
  const auto partial = [&](int which, int tile) {
    return rows.behind() + (int64_t(which) * column_tiles + tile) * row_tiles * kTile;
  };
  stage(rows, p, s, features, keys, labels, key_labels, nullptr, true, nullptr, norm);
  grid_barrier(barrier);

  const float over_tau = kLog2E / *temperature;
  for (int item = int(blockIdx.x); item < row_tiles * column_tiles; item += int(gridDim.x)) {
    const int row_tile = item % row_tiles, column_tile = item / row_tiles;
    tile_of_products<X>(rows.z, rows.width, rows.n, row_tile * kTile, p.first + column_tile * kTile, tile_memory());
    const int j = p.first + column_tile * kTile + lane();
    const float over_j = j < rows.n ? rows.plane(kOver)[j] : 0;
    for (int r = 0; r < kTile / kWarps; ++r) {
      const int local = warp() * (kTile / kWarps) + r, i = row_tile * kTile + local;
      if (i >= p.anchors) break;
      float s_ij = -float(infinity()), f = 0;
      bool positive = false;
      if (j < rows.n && j != i) {
        s_ij = score(tile_memory()[local * kPitch + lane()], rows.plane(kOver)[i], over_j, over_tau);
        const Weight w = weight_of(p, i, j);
        f = w.forth, positive = w.positive;
      }
      const float highest = warp_max(s_ij), pivot = highest == -float(infinity()) ? 0 : highest;
      const float sum = warp_sum(power(s_ij - pivot)), of_scores = warp_sum(f != 0 ? f * s_ij : 0), all = warp_sum(f);
      const float positives = float(__popc(__ballot_sync(kAll, positive)));
      if (lane() == 0) {
        partial(kHighest, column_tile)[i] = highest;
        partial(kExponentials, column_tile)[i] = sum;
        partial(kScores, column_tile)[i] = of_scores;
        partial(kWeights, column_tile)[i] = all;
        partial(kPositives, column_tile)[i] = positives;
      }
    }
  }
  grid_barrier(barrier);

  for (int i = int(thread_of_grid()); i < p.anchors; i += int(all_threads())) {
    float highest = -float(infinity());
    double sum = 0, pull = 0, lam = 0, count = 0;
    for (int t = 0; t < column_tiles; ++t) {
      const float other = partial(kHighest, t)[i], grown = fmaxf(highest, other);
      if (grown != -float(infinity()))
        sum = sum * double(power(highest - grown)) + double(partial(kExponentials, t)[i] * power(other - grown));
      highest = grown;
      pull += double(partial(kScores, t)[i]);
      lam += double(partial(kWeights, t)[i]);
      count += double(partial(kPositives, t)[i]);
    }
    // Peak and rest are added in float64: float32 of a large peak would swallow digits.
    double log_sum = infinity();
    float loss = 0;
    if (count > 0) {
      const double share = share_of(lam, count);
      log_sum = double(highest) * 0.6931471805599453 + double(logf(float(sum)));
      loss = float(lam * share * log_sum - pull * share * 0.6931471805599453);
    }
    lse[i] = log_sum;
    row_loss[i] = loss;
  }
}
#endif

#ifdef KERNEL_mlc_backward
// G_ij + G_ji, G_ij = push_i e^(s_ij - high_i) - pull_i f_ij of an anchor i and a column j; keys have no push.
struct Pull {
  const Rows<X>& rows;
  const Problem& p;
  struct Vector {
    float high, push, pull;
  };
  SADCL_INLINE Vector of(int i) const {
    return {rows.plane(kPivot)[i], rows.plane(kFactor)[i], rows.plane(kMaximum)[i]};
  }
  SADCL_INLINE float weight(int i, int j, const Vector& a, const Vector& b, float s) const {
    const bool forth = i < p.anchors && j >= p.first, back = j < p.anchors && i >= p.first;
    if (!forth && !back) return 0;
    const Weight w = weight_of(p, i, j);
    float g = 0;
    if (forth) g += a.push * power(s - a.high) - a.pull * w.forth;
    if (back) g += b.push * power(s - b.high) - b.pull * w.back;
    return g;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    mlc_backward(const float* upstream, const X* features, const X* keys, const LABELS* labels,
                 const LABELS* key_labels, const float* temperature, const double* lse, const double* norm, X* grad,
                 X* grad_keys, float* grad_temperature, X* z, uint64_t* words, float* scratch, X* weights,
                 int64_t entries, uint32_t* barrier, MlcSizes s) {
  const Problem p(words, s);
  const Rows<X> rows(z, scratch, p.anchors + int(s.keys), int(s.depth));
  bool active = false;
  for (int i = int(threadIdx.x); i < p.anchors; i += kThreads) active |= lse[i] != infinity();
  float* found = tile_memory();
  const uint32_t votes = __ballot_sync(kAll, active);
  if (lane() == 0) found[warp()] = votes != 0;
  __syncthreads();
  bool seen = false;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) seen |= found[w] != 0;
  stage(rows, p, s, features, keys, labels, key_labels, norm, seen, lse, nullptr);
  grid_barrier(barrier);

  for (int i = first_row_of_warp(); i < rows.n; i += all_warps()) {
    float sum = 0, high = float(infinity()), push = 0, pull = 0, peak = 0;
    int count = 0;
    const double log_sum = i < p.anchors ? lse[i] : infinity();
    if (log_sum != infinity()) {
      for (int j = p.first + lane(); j < rows.n; j += kWarp) {
        if (j == i) continue;
        const Weight w = weight_of(p, i, j);
        sum += w.forth, count += w.positive;
      }
      const double lam = double(warp_sum(sum)), share = share_of(lam, double(warp_sum(count)));
      const double m = double(upstream[i / p.views * s.upstream[0] + i % p.views * s.upstream[1]]);
      const double base_2 = log_sum * 1.4426950408889634;
      high = float(base_2);
      peak = float(m * lam * share);
      push = peak * power(float(double(high) - base_2));
      pull = float(m * share);
    }
    if (lane() == 0) {
      rows.plane(kAnchor)[i] = peak;
      rows.plane(kPivot)[i] = high;
      rows.plane(kFactor)[i] = push;
      rows.plane(kMaximum)[i] = pull;
    }
  }
  grid_barrier(barrier);

  const int D = int(s.depth);
  const auto row_of = [&](int i) -> X* {
    X* const to = i < p.anchors ? grad : grad_keys;
    return to ? to + int64_t(i < p.anchors ? i : i - p.anchors) * D : nullptr;
  };
  pair_gradient<NORMALIZE>(rows, Pull{rows, p}, row_of, D, *temperature, rows.behind(), weights, entries, barrier,
                           grad_temperature);
}
#endif

SADCL_KERNELS_END
