// The gradient of a loss of pairs of rows, whose weights are one symmetric matrix: g_i = 1 / tau sum_j W_ij z_j.
//
// A round makes the weights of as many rows as there is room for, tile by tile, meets, and multiplies them with the
// rows. z.g of a row, which the normalisation takes off, is added up from the weights as they are stored: so the
// product leaves nothing of it behind, and no further meeting is needed.
#pragma once
#include "grid.h"
#include "sscl_formula.h"
#include "sscl_rows.h"

SADCL_KERNELS_BEGIN

// Weights are stored in T: those of float16 times a power of two, which a softmax weight of a large batch needs.
template <class R>
SADCL_INLINE float weight_scale(const R&) {
  return 1;
}
SADCL_INLINE float weight_scale(const Rows<f16>& rows) {
  float peak = 0;
  for (int i = int(threadIdx.x); i < rows.n; i += kThreads) peak = fmaxf(peak, fabsf(rows.plane(kAnchor)[i]));
  peak = warp_max(peak);
  float* peaks = tile_memory();
  __syncthreads();
  if (lane() == 0) peaks[warp()] = peak;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, peaks[w]);
  return peak > 1e-30f ? scale_of(double(peak)) * 4096 : 1;
}

// Weights of a tile's rows, `weight` [.][pitch] from row `first` on, and what they add to z.g of each row.
template <class R, class P, class W>
SADCL_INLINE void row_weights(const R& rows, const P& pull, const float* tile, int row_tile, int column_tile,
                              bool across, float over_tau, float alpha, W* weight, int first, int pitch,
                              float* radial) {
  const int j = column_tile * kTile + lane();
  const bool there = j < rows.n;
  const float over_j = there ? rows.plane(kOver)[j] : 0;
  const auto vector = pull.of(there ? j : 0);
#pragma unroll
  for (int r = 0; r < kTile / kWarps; ++r) {
    const int local = warp() * (kTile / kWarps) + r, i = row_tile * kTile + local;
    float product = 0, w = 0;
    if (i < rows.n && there && i != j) {
      product = across ? tile[lane() * kPitch + local] : tile[local * kPitch + lane()];
      const float s = score(product, rows.plane(kOver)[i], over_j, over_tau);
      w = pull.weight(i, j, pull.of(i), vector, s) * (alpha * over_j);
    }
    const W stored = narrow<W>(w);
    weight[int64_t(i - first) * pitch + j] = stored;
    if (i < rows.n) {
      const float sum = warp_sum(widen(stored) * product) * rows.plane(kOver)[i];
      if (lane() == 0) radial[i] = sum;
    }
  }
}

// Of 32 rows from `first` on: z.g, times what the weights were scaled by.
template <class R>
SADCL_INLINE void add_radials(const R& rows, const float* radial, int first, float* out) {
#pragma unroll
  for (int r = 0; r < kTile / kWarps; ++r) {
    const int local = warp() * (kTile / kWarps) + r, i = first + local;
    float sum = 0;
    if (i < rows.n)
      for (int t = lane(); t < rows.tiles; t += kWarp) sum += radial[int64_t(t) * rows.room + i];
    sum = warp_sum(sum);
    if (lane() == 0) out[local] = sum;
  }
}

// Of staged rows that every block sees. `row_of(i)` is where row i's gradient [D] goes, or null; `radial` has room for
// [tiles][room] numbers, `weights` for `entries`, at least 32 rows of all columns. The temperature's gradient may be
// null.
template <bool UNIT, class T, class P, class F>
SADCL_INLINE void pair_gradient(const Rows<T>& rows, const P& pull, F row_of, int D, float tau, float* radial,
                                T* weights, int64_t entries, uint32_t* barrier, float* grad_temperature) {
  const float over_tau = kLog2E / tau, alpha = weight_scale(rows), factor = 1 / (alpha * tau);
  const int pitch = rows.tiles * kTile, slices = (D + kSlice - 1) / kSlice;
  const int height = rows.tiles == 0 ? 1 : int(min(entries / (int64_t(pitch) * kTile), int64_t(rows.tiles)));
  const bool whole = height == rows.tiles;
  for (int first = 0; first < rows.tiles; first += height) {
    const int stop = min(first + height, rows.tiles), origin = first * kTile;
    const int items = whole ? rows.tiles * (rows.tiles + 1) / 2 : (stop - first) * rows.tiles;
    for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
      int row_tile = first + item / rows.tiles, column_tile = item % rows.tiles;
      if (whole) triangle(item, row_tile, column_tile);
      const int high = max(row_tile, column_tile), low = min(row_tile, column_tile);
      tile_of_products<T>(rows.z, rows.width, rows.n, high * kTile, low * kTile, tile_memory());
      row_weights(rows, pull, tile_memory(), row_tile, column_tile, row_tile < column_tile, over_tau, alpha, weights,
                  origin, pitch, radial + int64_t(column_tile) * rows.room);
      if (whole && row_tile != column_tile)
        row_weights(rows, pull, tile_memory(), column_tile, row_tile, true, over_tau, alpha, weights, origin, pitch,
                    radial + int64_t(row_tile) * rows.room);
    }
    grid_barrier(barrier);
    for (int item = int(blockIdx.x); item < (stop - first) * slices; item += int(gridDim.x)) {
      const int row0 = (first + item / slices) * kTile, d0 = item % slices * kSlice;
      float* radials = tile_memory() + kSlice * kSlicePitch;
      __syncthreads();
      add_radials(rows, radial, row0, radials);
      float sums[kSums];
      weighted_rows<T>(weights + int64_t(row0 - origin) * pitch, pitch, rows.z, rows.width, rows.n, d0, tile_memory(),
                       sums);
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kSums; ++e) {
        const int local = SumsOf<T>::row(e), i = row0 + local, d = d0 + SumsOf<T>::column(e);
        if (i >= rows.n || d >= D) continue;
        float g = sums[e] * factor;
        if (UNIT) {
          const float over = rows.plane(kOver)[i], unit = widen(rows.z[int64_t(i) * rows.width + d]) * over;
          // 1 / |x| by its two factors: the product may leave the range.
          g = sscl_tangential(g, unit, radials[local] * factor) * over * rows.plane(kScale)[i];
        }
        T* const row = row_of(i);
        if (row) row[d] = narrow<T>(g);
      }
    }
    if (stop < rows.tiles) grid_barrier(barrier);
  }

  // Half, because a pair is counted from both sides.
  if (blockIdx.x != gridDim.x - 1 || !grad_temperature) return;
  double total = 0;
  for (int i = int(threadIdx.x); i < rows.n; i += kThreads)
    for (int t = 0; t < rows.tiles; ++t) total += double(radial[int64_t(t) * rows.room + i]);
  __syncthreads();
  total = block_sum<kThreads>(total, reinterpret_cast<double*>(shared_memory));
  if (threadIdx.x == 0) *grad_temperature = float(-0.5 * total * double(factor) / double(tau));
}

SADCL_KERNELS_END
