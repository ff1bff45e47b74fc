// SSCL in one launch each way. At the size of a training step (190 rows of 1,024) launches are what costs: here blocks
// meet at a barrier of the grid where the other kernels launch again, twice in the forward, twice in the backward.
//
// Results do not depend on the number of blocks: what is added up is added up by tile, in the order of the tiles.
//
// Defines: X (features), NORMALIZE; forward: RELEASED, FUSED (labels are compacted here), LABEL (their type).
#include "compaction.h"
#include "pair_gradient.h"

SADCL_KERNELS_BEGIN

#ifdef KERNEL_sscl_forward

// Of each row and tile of columns: highest score, sum of exponentials against it (both in base 2), sum over positives.
struct Partials {
  float* at;
  int tiles, room;
  SADCL_INLINE float* of(int which, int tile) const { return at + (int64_t(which) * tiles + tile) * room; }
};

// A warp's four rows of a tile; `across` the tile's columns take the part of rows.
template <class R>
SADCL_INLINE void row_sums(const R& rows, const float* tile, int row_tile, int column_tile, bool across, float over_tau,
                           const Partials& out) {
  const int j = column_tile * kTile + lane();
  const float over_j = j < rows.n ? rows.plane(kOver)[j] : 0;
#pragma unroll
  for (int r = 0; r < kTile / kWarps; ++r) {
    const int local = warp() * (kTile / kWarps) + r, i = row_tile * kTile + local;
    if (i >= rows.n) break;
    const float product = across ? tile[lane() * kPitch + local] : tile[local * kPitch + lane()];
    const bool other = j < rows.n && j != i;
    const float s = other ? score(product, rows.plane(kOver)[i], over_j, over_tau) : -float(infinity());
    const float highest = warp_max(s), pivot = highest == -float(infinity()) ? 0 : highest;
    const float sum = warp_sum(power(s - pivot)), positive = warp_sum(other && rows.same(i, j) ? s : 0.0f);
    if (lane() == 0) {
      out.of(0, column_tile)[i] = highest;
      out.of(1, column_tile)[i] = sum;
      out.of(2, column_tile)[i] = positive;
    }
  }
}

// The mean over row i's positives of R, the largest score of a class that both images have: 0 counts, unless they share
// all classes. A warp's work. `index` [B, C]: the pair that an (image, class) became, or -1.
template <class R>
SADCL_INLINE float mean_maximum(const R& rows, const int* pairs, const int* index, int C, int i, float over_tau) {
  const int first = rows.numbers(kFirst)[i], last = rows.numbers(kLast)[i];
  const int* mine = index + int64_t(pairs[i / rows.views] / C) * C;
  float total = 0;
  for (int p = first; p < last; ++p) {
    if (p == i) continue;
    const int* theirs = index + int64_t(pairs[p / rows.views] / C) * C;
    float best = -float(infinity());
    int shared = 0;
    for (int start = 0; start < C; start += kWarp) {
      const bool both = start + lane() < C && mine[start + lane()] >= 0 && theirs[start + lane()] >= 0;
      for (uint32_t left = __ballot_sync(kAll, both); left != 0; left &= left - 1) {
        const int k = start + __ffs(int(left)) - 1;
        const int a = mine[k] * rows.views + i % rows.views, b = theirs[k] * rows.views + p % rows.views;
        float sum = 0;
        for (int d = lane(); d < rows.width; d += kWarp)
          sum += widen(rows.z[int64_t(a) * rows.width + d]) * widen(rows.z[int64_t(b) * rows.width + d]);
        best = fmaxf(best, score(warp_sum(sum), rows.plane(kOver)[a], rows.plane(kOver)[b], over_tau));
        ++shared;
      }
    }
    total += shared == C ? best : fmaxf(best, 0);
  }
  return total / float(max(last - first - 1, 1));
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sscl_forward(const LABEL* labels, int8_t* target, int32_t* pairs, int32_t* class_ptr, const X* features,
                 const float* temperature, float* row_loss, float* lse, double* norm, X* z, float* scratch,
                 uint32_t* barrier, Sizes sizes) {
  const int B = int(sizes.images), C = int(sizes.classes), V = int(sizes.views), capacity = int(sizes.capacity);
#if FUSED
  const Compacted active = compacted(labels, sizes.other, B, C, capacity, reinterpret_cast<int*>(shared_memory));
  const Rows<X> rows(z, scratch, sizes, active.count);
  for (int64_t t = thread_of_grid(); t < int64_t(B) * C; t += all_threads())
    target[t] = int8_t(target_of(labels[t / C * sizes.other[0] + t % C * sizes.other[1]]));
  for (int64_t t = thread_of_grid(); t <= C; t += all_threads()) class_ptr[t] = active.starts[t];
  for (int64_t t = thread_of_grid(); t < capacity; t += all_threads())
    pairs[t] = t < active.count ? active.pairs[t] : 0;
  const int* pair_list = active.pairs;
  const int* starts = active.starts;
#else
  const int *pair_list = pairs, *starts = class_ptr, segments = int(sizes.segments);
  const Rows<X> rows(z, scratch, sizes, starts[segments]);
#endif
  const int room = int(sizes.capacity) * V, all_tiles = rows.room / kTile;
  const Partials partials = {rows.behind(), all_tiles, rows.room};
  int* index = reinterpret_cast<int*>(rows.behind() + int64_t(3) * all_tiles * rows.room);

  for (int i = first_row_of_warp(); i < rows.n; i += all_warps()) {
    const int p = i / V, pair = pair_list[p];
#if FUSED
    const Range range = {starts[pair % C], min(starts[pair % C + 1], capacity)};
#else
    Range range = segment_of(starts, segments, p);
    range.last = min(range.last, capacity);
#endif
    const double length = stage_row<X, NORMALIZE>(rows, sizes, features, i, pair, range, nullptr);
    if (lane() == 0) norm[i] = length;
  }
  for (int64_t i = rows.n + thread_of_grid(); i < room; i += all_threads()) norm[i] = lse[i] = lse[room + i] = 0;
  for (int64_t i = thread_of_grid(); i < int64_t(B) * V * C; i += all_threads()) row_loss[i] = 0;
  if (RELEASED && blockIdx.x == 0) {
    for (int t = int(threadIdx.x); t < B * C; t += kThreads) index[t] = -1;
    __syncthreads();
    for (int p = int(threadIdx.x); p < rows.n / V; p += kThreads) index[pair_list[p]] = p;
  }
  grid_barrier(barrier);

  const float tau = *temperature, over_tau = kLog2E / tau;
  for (int item = int(blockIdx.x); item < rows.tiles * (rows.tiles + 1) / 2; item += int(gridDim.x)) {
    int row_tile, column_tile;
    triangle(item, row_tile, column_tile);
    tile_of_products<X>(rows.z, rows.width, rows.n, row_tile * kTile, column_tile * kTile, tile_memory());
    row_sums(rows, tile_memory(), row_tile, column_tile, false, over_tau, partials);
    if (row_tile != column_tile) row_sums(rows, tile_memory(), column_tile, row_tile, true, over_tau, partials);
  }
  if (RELEASED)
    for (int i = first_row_of_warp(); i < rows.n; i += all_warps()) {
      const float mean = mean_maximum(rows, pairs, index, C, i, over_tau);
      if (lane() == 0) rows.plane(kMaximum)[i] = mean;
    }
  grid_barrier(barrier);

  for (int i = int(thread_of_grid()); i < rows.n; i += int(all_threads())) {
    float highest = -float(infinity()), sum = 0, positive = 0;
    for (int t = 0; t < rows.tiles; ++t) {
      const float other = partials.of(0, t)[i], grown = fmaxf(highest, other);
      if (grown != -float(infinity())) sum = sum * power(highest - grown) + partials.of(1, t)[i] * power(other - grown);
      highest = grown;
      positive += partials.of(2, t)[i];
    }
    float pivot = highest == -float(infinity()) ? 0 : highest;
    if (RELEASED) pivot = fmaxf(pivot, 0);
    const int peers = rows.numbers(kLast)[i] - rows.numbers(kFirst)[i] - 1;
    float log_sum = float(infinity()), loss = 0;
    if (peers > 0) {
      log_sum = sscl_log_sum(sum, power(highest - pivot), RELEASED);
      loss = sscl_row_loss(pivot * kLn2, log_sum, positive * kLn2 / float(peers),
                           RELEASED ? rows.plane(kMaximum)[i] * kLn2 : 0.0f, RELEASED);
    }
    if (rows.overflowed) loss = log_sum = float(infinity()) - float(infinity());
    lse[i] = pivot;
    lse[room + i] = log_sum;
    row_loss[rows.numbers(kSlot)[i]] = loss;
  }
}
#endif

#ifdef KERNEL_sscl_backward

// What moves a pair, m_i e^(s_ij - lse_i) + m_j e^(s_ij - lse_j) - [same class] (m_i + m_j) / k.
struct Pull {
  const Rows<X>& rows;
  struct Vector {
    float anchor, pivot, factor;
  };
  SADCL_INLINE Vector of(int i) const {
    return {rows.plane(kAnchor)[i], rows.plane(kPivot)[i], rows.plane(kFactor)[i]};
  }
  SADCL_INLINE float weight(int i, int j, const Vector& a, const Vector& b, float s) const {
    const int first = rows.numbers(kFirst)[i], last = rows.numbers(kLast)[i];
    const float w = a.factor * power(s - a.pivot) + b.factor * power(s - b.pivot);
    return j >= first && j < last ? w - (a.anchor + b.anchor) / float(last - first - 1) : w;
  }
};

// `weights` has room for `entries` of them, at least 32 rows of all columns: few rows take one round, many several.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sscl_backward(const float* upstream, const X* features, const int32_t* pairs, const int32_t* class_ptr,
                  const float* temperature, const float* lse, const double* norm, X* grad, float* grad_temperature,
                  X* z, float* scratch, X* weights, int64_t entries, uint32_t* barrier, Sizes sizes) {
  const int C = int(sizes.classes), V = int(sizes.views), D = int(sizes.depth), capacity = int(sizes.capacity);
  const Rows<X> rows(z, scratch, sizes, class_ptr[sizes.segments]);
  const int room = capacity * V;

  for (int i = first_row_of_warp(); i < rows.n; i += all_warps()) {
    Range range = segment_of(class_ptr, int(sizes.segments), i / V);
    range.last = min(range.last, capacity);
    const int pair = pairs[i / V];
    stage_row<X, NORMALIZE>(rows, sizes, features, i, pair, range, norm + i);
    if (lane() == 0) {
      const float log_sum = lse[room + i];
      float m = upstream[pair / C * sizes.other[0] + i % V * sizes.other[1] + pair % C * sizes.other[2]];
      if (log_sum == float(infinity())) m = 0;
      rows.plane(kAnchor)[i] = m;
      rows.plane(kPivot)[i] = lse[i];
      rows.plane(kFactor)[i] = m * power(-log_sum * kLog2E);
    }
  }
  const int64_t numbers = sizes.images * V * C * D, vectors = numbers * int64_t(sizeof(X)) / 16;
  for (int64_t t = thread_of_grid(); t < vectors; t += all_threads()) reinterpret_cast<Four*>(grad)[t] = {0, 0, 0, 0};
  for (int64_t t = vectors * 16 / int64_t(sizeof(X)) + thread_of_grid(); t < numbers; t += all_threads())
    grad[t] = narrow<X>(0.0f);
  grid_barrier(barrier);

  pair_gradient<NORMALIZE>(
      rows, Pull{rows}, [&](int i) { return grad + int64_t(rows.numbers(kSlot)[i]) * D; }, D, *temperature,
      rows.behind(), weights, entries, barrier, grad_temperature);
}
#endif

SADCL_KERNELS_END
