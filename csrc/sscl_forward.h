// SSCL forward: one visit to each pair of blocks of rows, half of the N x N scores; `kept` takes what it has room for.
#pragma once
#include "sscl_blocks.h"
#include "sscl_formula.h"
#include "sscl_released.h"

SADCL_KERNELS_BEGIN

// What a thread needs while it works on a block.
template <class T>
struct Workspace {
  static constexpr int kRows = Blocks<T>::kMaxPanels * Tile<T>::P;
  static constexpr int64_t kSquare = int64_t(kRows) * kRows;
  alignas(64) T w[kSquare];
  alignas(64) T w_transposed[kSquare];
  alignas(64) T lanes[kRows * Tile<T>::kLanes];
  alignas(64) T row_values[kRows], col_values[kRows];
  double row_sums[kRows], col_sums[kRows];
};

template <class T>
Block<T> block_of(const Rows<T>& rows, const Blocks<T>& blocks, int64_t a, int64_t b, Workspace<T>& ws) {
  const Range i = blocks.panels_of(a), j = blocks.panels_of(b);
  constexpr int P = Block<T>::P;
  return {i.first * P, j.first * P, rows.n, int(i.last - i.first) * P, int(j.last - j.first), ws.w};
}

// R: Rows, or Vectors of mlc_vectors.h. Of the block's rows only the first `count` are needed.
template <class R, class T>
void compute_scores(R& rows, const Block<T>& block, int64_t count) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
  if constexpr (kHasPairs && sizeof(T) == 4) {
    if (rows.paired) {
      dot_panels(rows.pair_panel(block.i0 / P), block.m / P, rows.pair_panel(block.j0 / P), block.panels,
                 rows.pair_depth, block.w, count);
      for (int jp = 0; jp < block.panels; ++jp)
        for (int i = 0; i < count; ++i)
          for (int v = 0; v < 3; ++v) {
            T* s = block.at(jp, i) + v * L;
            store(s, load(s) * load(rows.remainder.get() + block.j0 + jp * P + v * L) * rows.remainder[block.i0 + i]);
          }
      return;
    }
  }
  dot_panels(rows.panel(block.i0 / P), block.m / P, rows.panel(block.j0 / P), block.panels, rows.depth, block.w, count);
}
template <class R, class T>
void compute_scores(R& rows, const Block<T>& block) {
  compute_scores(rows, block, block.m);
}

// Per row, over the columns visited so far. Up to the end scores are plain z_i.z_j: e^s is 2^(z_i.z_j * scale).
template <class T>
struct Statistics {
  Scratch<double> sum;       // of e^(s - peak / temperature)
  Scratch<double> positive;  // of z_i.z_p over the positives p
  Scratch<T> peak;           // the largest z_i.z_j; with a fixed shift -inf, meaning 0
  bool fixed = false;
  explicit Statistics(int64_t n) : sum(n + 1), positive(n + 1), peak(n + 1) {
    for (int64_t i = 0; i < n; ++i) sum[i] = positive[i] = 0, peak[i] = T(-HUGE_VAL);
  }
};

template <class T>
void add_sums(const Block<T>& block, const Workspace<T>& ws, Scratch<double>& total) {
  for (int i = 0; i < block.m && block.i0 + i < block.n; ++i) total[block.i0 + i] += ws.row_sums[i];
  if (block.diagonal()) return;
  for (int j = 0; j < block.panels * Block<T>::P && block.j0 + j < block.n; ++j) total[block.j0 + j] += ws.col_sums[j];
}

// The numerators. They could be had from class sums as z_i.(S_c - z_i); but the scores are here, in cache, so adding
// them costs n_c^2 additions, no second pass over z, and no cancellation of z_i.z_i.
template <class T>
void add_positives(const Rows<T>& rows, const Block<T>& block, Workspace<T>& ws, Scratch<double>& positive) {
  constexpr int P = Block<T>::P;
  for_same_class(rows, block, [&](const Rect& r) {
    const int r0 = int(r.rows.first - block.i0), r1 = int(r.rows.last - block.i0);
    for (int jp = int(r.cols.first - block.j0) / P; jp * P < r.cols.last - block.j0; ++jp) {
      const LaneMask<T> mask(block, jp, r.cols);
      sums(block, jp, jp + 1, r0, r1, ws.lanes, ws.row_sums, ws.col_sums,
           [&](vec<T> s, int, int, int v) { return mask.v[v] ? s : vec<T>{}; });
      for (int i = r0; i < r1; ++i) positive[block.i0 + i] += ws.row_sums[i - r0];
      if (block.diagonal()) continue;
      const int64_t base = block.j0 + int64_t(jp) * P;
      for (int l = 0; l < P && base + l < block.n; ++l) positive[base + l] += ws.col_sums[l];
    }
  });
}

// --- few rows: all scores fit a cache ---

template <class T>
T largest_of(const T* s, int64_t n) {
  T value = T(-HUGE_VAL);
  for (int64_t j = 0; j < n; ++j) value = s[j] > value ? s[j] : value;
  return value;
}

template <class T>
double sum_exp(const T* s, int64_t n, T pivot, Scale<T> scale) {
  constexpr int L = Simd<T>::kLanes;
  vec<T> total = {};
  int64_t j = 0;
  for (; j + L <= n; j += L) total += exp2<T>(loadu(s + j) - pivot, scale);
  vec<T> tail = splat(T(-HUGE_VAL));
  for (int l = 0; j + l < n; ++l) tail[l] = s[j + l];
  return double(sum<T>(total + exp2<T>(tail - pivot, scale)));
}

// Scores of panel p against itself and those after it, written to both places of the symmetric square [n][n]. Its own
// rows are the lanes: of the last panel, which may be all but empty, only the rows that there are get multiplied.
template <class T>
void fill_square_panel(Rows<T>& rows, int64_t p, T* w, T* square) {
  constexpr int P = Rows<T>::P;
  const int64_t n = rows.n, i0 = p * P, lanes = n - i0 < P ? n - i0 : P;
  const Block<T> block = {i0, i0, n, int(rows.panels - p) * P, 1, w};
  compute_scores(rows, block, n - i0);
  for (int64_t i = i0; i < n; ++i) memcpy(square + i * n + i0, w + (i - i0) * P, size_t(lanes) * sizeof(T));
  for (int64_t i = i0 + P; i < n; i += 8) {
    const T* row[8];
    const int count = int(n - i < 8 ? n - i : 8);
    for (int l = 0; l < count; ++l) row[l] = w + (i + l - i0) * P;
    if (count == 8) {
      transpose_lanes<T>(row, P, int(n), square + i0 * n + i);
    } else {
      for (int64_t j = 0; j < P; ++j)
        for (int l = 0; l < count; ++l) square[(i0 + j) * n + i + l] = row[l][j];
    }
  }
}

// Half of the scores computed, all kept; then every row by itself. No rounds: nobody adds to another's sums.
template <class T>
void fill_square(Rows<T>& rows, T* square, Statistics<T>& stats) {
  const int64_t n = rows.n, size = rows.panels * Rows<T>::P * Rows<T>::P;
  const Scale<T> scale(kLog2E / rows.in.temperature);
  Scratch<T> scores(rows.threads * size);
#pragma omp parallel num_threads(rows.threads)
  {
#pragma omp for schedule(dynamic, 1)  // the longest first
    for (int64_t p = 0; p < rows.panels; ++p) fill_square_panel(rows, p, scores.get() + thread_index() * size, square);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const T* s = square + i * n;
      const T left = largest_of(s, i), right = largest_of(s + i + 1, n - i - 1), peak = left > right ? left : right;
      const T pivot = peak == T(-HUGE_VAL) ? T(0) : peak;
      stats.peak[i] = peak;
      stats.sum[i] = sum_exp(s, i, pivot, scale) + sum_exp(s + i + 1, n - i - 1, pivot, scale);
      const Range same = rows.rows_of(rows.classes[i]);
      for (int64_t j = same.first; j < same.last; ++j) stats.positive[i] += j == i ? 0 : double(s[j]);
    }
  }
}

// --- many rows: a sweep over blocks ---

// |s| <= kFixedBound: sums of e^s and products with e^-lse are far from float32's limits, no maximum is needed.
constexpr double kFixedBound = 40;

// Not of doubles: there e^-lse is off by as many units as lse has, more than all else together.
template <class T>
bool fixed_pivot(double bound) {
  return sizeof(T) < sizeof(double) && bound <= kFixedBound;
}

template <class T>
void add_exponentials(const Block<T>& block, Scale<T> scale, Workspace<T>& ws, Statistics<T>& stats) {
  sums(block, 0, block.panels, 0, block.m, ws.lanes, ws.row_sums, ws.col_sums,
       [&](vec<T> s, int, int, int) { return exp2<T>(s, scale); });
  add_sums(block, ws, stats.sum);
}

// Moves a row's pivot up to `candidate` and returns it, 0 as long as it is -inf.
template <class T>
T raise_peak(Statistics<T>& stats, int64_t i, T candidate, double scale) {
  const T old = stats.peak[i];
  if (candidate > old) {
    stats.sum[i] *= ::exp2((double(old) - double(candidate)) * scale);
    stats.peak[i] = candidate;
  }
  return stats.peak[i] == T(-HUGE_VAL) ? T(0) : stats.peak[i];
}

// The same with a running maximum. Rows and columns have different pivots, hence two exponentials a score.
template <class T>
void add_exponentials_online(const Block<T>& block, Scale<T> scale, Workspace<T>& ws, Statistics<T>& stats) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
  const double exact = double(scale.high) + double(scale.low);
  const vec<T> lowest = splat(T(-HUGE_VAL));
  for (int i = 0; i < block.m; ++i) store(ws.lanes + i * L, lowest);
  for (int jp = 0; jp < block.panels; ++jp) {
    vec<T> col[3] = {lowest, lowest, lowest};
    for (int i = 0; i < block.m; ++i) {
      vec<T> row = load(ws.lanes + i * L);
      for (int v = 0; v < 3; ++v) {
        const vec<T> s = load(block.at(jp, i) + v * L);
        col[v] = vmax<T>(s, col[v]);
        row = vmax<T>(s, row);
      }
      store(ws.lanes + i * L, row);
    }
    for (int v = 0; v < 3; ++v) store(ws.col_values + jp * P + v * L, col[v]);
  }
  for (int i = 0; i < block.m && block.i0 + i < block.n; ++i) {
    T largest = ws.lanes[i * L];
    for (int l = 1; l < L; ++l) largest = ws.lanes[i * L + l] > largest ? ws.lanes[i * L + l] : largest;
    ws.row_values[i] = raise_peak(stats, block.i0 + i, largest, exact);
  }
  if (!block.diagonal())
    for (int j = 0; j < block.panels * P && block.j0 + j < block.n; ++j)
      ws.col_values[j] = raise_peak(stats, block.j0 + j, ws.col_values[j], exact);

  double unused[Workspace<T>::kRows];
  if (!block.diagonal())
    sums(block, 0, block.panels, 0, block.m, ws.lanes, unused, ws.col_sums,
         [&](vec<T> s, int, int jp, int v) { return exp2<T>(s - load(ws.col_values + jp * P + v * L), scale); });
  sums(block, 0, block.panels, 0, block.m, ws.lanes, ws.row_sums, unused,
       [&](vec<T> s, int i, int, int) { return exp2<T>(s - ws.row_values[i], scale); });
  add_sums(block, ws, stats.sum);
}

template <class T>
void sweep_forward(Rows<T>& rows, bool fixed, Statistics<T>& stats, T* kept_scores, int64_t kept_size) {
  const Blocks<T> blocks(rows.panels, rows.threads);
  const Kept<T> kept(kept_scores, kept_size, blocks);
  kept.begin();
  const Scale<T> scale(kLog2E / rows.in.temperature);
  stats.fixed = fixed;
  Scratch<Workspace<T>> workspaces(rows.threads);
  for_all_pairs(blocks.count, rows.threads, [&](int64_t a, int64_t b) {
    Workspace<T>& ws = workspaces[thread_index()];
    const Block<T> block = block_of(rows, blocks, a, b, ws);
    compute_scores(rows, block);
    if (T* copy = kept.at(a, b)) memcpy(copy, ws.w, size_t(kept.count(a, b)) * sizeof(T));
    block.set_diagonal(0);
    add_positives(rows, block, ws, stats.positive);
    block.set_diagonal(T(-HUGE_VAL));
    block.set_padding(T(-HUGE_VAL));
    fixed ? add_exponentials(block, scale, ws, stats) : add_exponentials_online(block, scale, ws, stats);
  });
}

// The pivot (the largest z_i.z_j, or 0), the log-sum over it and the loss of each row from its statistics. Apart,
// because lse as one float32 number is off by half a unit where scores reach 1e7, and the backward's softmax with it;
// `maxima` is the mean of R over the row's positives (oracle: sadcl/reference/sscl.py).
template <class T>
void write_rows(Rows<T>& rows, const SsclForward& args, const Statistics<T>& stats, const double* maxima) {
  T *pivots = static_cast<T*>(args.lse), *log_sums = pivots + rows.V * rows.in.capacity;
  T* row_loss = static_cast<T*>(args.row_loss);
  const double temperature = rows.in.temperature;
  for (int64_t i = 0; i < rows.n; ++i) {
    const Range same = rows.rows_of(rows.classes[i]);
    const double positives = double(same.last - same.first - 1);
    const T peak = stats.fixed ? T(0) : stats.peak[i];
    pivots[i] = positives == 0 || (args.released && !(peak > 0)) ? T(0) : peak;
    if (positives == 0) {
      log_sums[i] = T(HUGE_VAL);
      continue;
    }
    const double pivot = double(pivots[i]) / temperature;
    const double moved = args.released ? exp(double(peak) / temperature - pivot) : 1;
    const double log_sum = sscl_log_sum(stats.sum[i], moved, args.released);
    log_sums[i] = T(log_sum);
    row_loss[rows.flat(rows.place(i))] = T(sscl_row_loss(pivot, log_sum, stats.positive[i] / positives / temperature,
                                                         args.released ? maxima[i] : 0, args.released));
  }
}

template <class T>
Fill rest(T* data, int64_t from, int64_t to) {
  return {data + from, (to - from) * int64_t(sizeof(T))};
}

template <class T>
void forward(const SsclForward& args) {
  Rows<T> rows(args.rows, args.released ? Rows<T>::kUnits : Rows<T>::kScores);
  const int64_t capacity = rows.V * args.rows.capacity, squared = rows.n * rows.n;
  const bool small = squared <= kFewScores, fits = small && squared <= args.kept_size;
  T* kept = static_cast<T*>(args.kept);
  want_huge_pages(kept, size_t(args.kept_size) * sizeof(T));
  gather(rows, args.norm, false,
         {rest(static_cast<T*>(args.row_loss), 0, rows.in.features.shape[0] * rows.V * rows.C),
          rest(static_cast<T*>(args.lse), rows.n, capacity),
          rest(static_cast<T*>(args.lse), capacity + rows.n, 2 * capacity), rest(args.norm, rows.n, capacity),
          rest(kept, fits ? squared : 0, small ? args.kept_size : 0)});

  Scratch<T> own(small && !fits ? squared : 1);
  T* square = !small ? nullptr : fits ? kept : own.get();
  Statistics<T> stats(rows.n);
  if (small) fill_square(rows, square, stats);
  else sweep_forward(rows, !args.released && fixed_pivot<T>(rows.bound), stats, kept, args.kept_size);
  Scratch<double> maxima(args.released ? rows.n + 1 : 1);
  if (args.released) released_maxima(rows, square, maxima.get());
  write_rows(rows, args, stats, maxima.get());
}

SADCL_KERNELS_END
