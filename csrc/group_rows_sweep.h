// Own rows against columns of all ranks: part of mlc.cpp, whose sweep it is.
//
// Columns come in parts (what a ring passes on, a few thousand rows), so the forward gives sums that can be merged, and
// the backward adds to a gradient. Columns that are anchors of other ranks bring four numbers each, and a block of
// scores gives own rows what they receive as anchors and as columns:
//
//   g_i += sum_j (G_ij + G_ji) z_j,   G_ij = a_i b_j e^(s_ij - lse_i) - c_i f_ij
//
// with a_i = m_i sum_j W_ij and c_i = m_i times the factor that makes W of f. It is the whole gradient of own rows but
// for 1 / tau and the normalisation. Floor: 2 R K D flops forward, 4 backward, and K D numbers read in each; the
// symmetry of the scores brings nothing, as no rank adds to the rows of another. Oracles: those of the losses on the
// concatenated batch.
#pragma once
#include "group_rows.h"
#include "mlc_sweep.h"

SADCL_KERNELS_BEGIN

// False if a label is not allowed.
template <class T>
bool forward_of_own_rows(const GroupRowsForward& args) {
  const MlcInputs& in = args.in;
  Vectors<T> v(in, Vectors<T>::kScoresAlone);
  Scratch<double> norm(v.anchors().rows + v.segments[kKeys].rows + 1);
  v.gather(norm.get(), nullptr);
  Pairs<T> pairs(v);
  if (!pairs.valid) return false;
  const Scale<T> scale(kLog2E / in.temperature);
  Sums<T> sums(v);
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  sweep(v, workspaces, Scores<T>{}, [&](const Block<T>& block, int segment, Workspace<T>& ws) {
    add_scores(v, pairs, block, segment, scale, &tiles[thread_index()], ws, sums);
  });
  const int64_t R = v.anchors().rows;
  for (int64_t i = 0; i < R; ++i) {
    args.sums[i] = sums.stats.fixed ? 0 : double(sums.stats.peak[i]);
    args.sums[R + i] = sums.stats.sum[i], args.sums[2 * R + i] = sums.stats.positive[i];
    const double total = sums.tally.total[i], count = sums.tally.count[i];
    args.sums[3 * R + i] = pairs.totals_wanted() ? total : count;
    args.sums[4 * R + i] = pairs.counts_wanted() ? count : total;
  }
  return true;
}

// Moves of a segment's anchors; `stats` as GroupRowsBackward has them.
template <class T>
void fill_moves(const Segment& s, const T* stats, double tau, Moves<T>& moves) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const double a = stats[r], c = stats[s.rows + r], peak = stats[2 * s.rows + r], log_sum = stats[3 * s.rows + r];
    const int64_t i = s.first * Vectors<T>::P + r;
    if (log_sum == HUGE_VAL || (a == 0 && c == 0)) continue;
    if (!moves.fixed) moves.shift[i] = T(peak);
    moves.push[i] = T(a * ::exp(moves.fixed ? -peak / tau - log_sum : -log_sum));
    moves.pull[i] = T(c);
  }
}

// From a segment's panels to rows; a few cache lines of a row at a time, while those of the panel are near.
template <class T>
void add_gradient(const Vectors<T>& v, const Segment& s, const T* from, bool add, T* to) {
  constexpr int P = Vectors<T>::P, kSlice = 32;
  const int64_t D = v.D;
#pragma omp parallel for num_threads(v.threads) schedule(static)
  for (int64_t p = 0; p < s.panels; ++p) {
    const T* panel = from + (s.first + p) * v.depth * P;
    const int64_t rows = s.rows - p * P < P ? s.rows - p * P : P;
    for (int64_t d0 = 0; d0 < D; d0 += kSlice) {
      const int64_t d1 = d0 + kSlice < D ? d0 + kSlice : D;
      for (int64_t l = 0; l < rows; ++l) {
        T* row = to + (p * P + l) * D;
        for (int64_t d = d0; d < d1; ++d) row[d] = (add ? row[d] : T(0)) + panel[d * P + l];
      }
    }
  }
}

template <class T>
void backward_of_own_rows(const GroupRowsBackward& args) {
  constexpr int P = Vectors<T>::P;
  const MlcInputs& in = args.in;
  Vectors<T> v(in);
  const Segment &own = v.anchors(), &others = v.segments[kKeys];
  Scratch<double> norm(own.rows + others.rows + 1);
  v.gather(norm.get(), nullptr);
  const T *stats = static_cast<const T*>(args.anchors), *theirs = static_cast<const T*>(args.columns);
  const bool both = theirs != nullptr;
  Pairs<T> pairs(v);
  if (!both)  // an anchor without a positive may hold anything
    for (int64_t i = 0; i < own.rows; ++i)
      if (stats[3 * own.rows + i] == T(HUGE_VAL))
        for (int64_t d = 0; d < v.D; ++d) v.panel(i / P)[d * P + i % P] = 0;
  Moves<T> moves(v.panels * P, fixed_pivot<T>(v.bound));
  fill_moves(own, stats, in.temperature, moves);
  if (both) fill_moves(others, theirs, in.temperature, moves);
  const int64_t panels = args.grad_columns != nullptr ? v.panels : own.panels;
  Scratch<T> gradients(panels * v.depth * P + 1);
  memset(gradients.get(), 0, size_t(panels * v.depth * P) * sizeof(T));
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  const Scale<T> scale(kLog2E / in.temperature);
  sweep(v, workspaces, Scores<T>{}, [&](const Block<T>& block, int segment, Workspace<T>& ws) {
    const Weights<T>& weights = tiles[thread_index()].fill(v, pairs, block, segment);
    to_moves<true>(block, both, moves, &weights, factor_of<T>(in, segment), scale);
    set_strangers(v, block, segment, T(0));
    transpose_blocks(ws.w, block.panels, block.m / P, ws.w_transposed);
    mix_panels(ws.w_transposed, block.m / P, v.panel(block.j0 / P), block.panels, v.depth,
               gradients.get() + block.i0 * v.depth);
    if (args.grad_columns != nullptr)
      mix_panels(ws.w, block.panels, v.panel(block.i0 / P), block.m / P, v.depth, gradients.get() + block.j0 * v.depth);
  });
  add_gradient(v, own, gradients.get(), true, static_cast<T*>(args.gradient));
  if (args.grad_columns != nullptr) add_gradient(v, others, gradients.get(), false, static_cast<T*>(args.grad_columns));
}

SADCL_KERNELS_END
