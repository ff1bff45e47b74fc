// SSCL backward: scores again (or as kept), turned into weights in place, and two products per pair of blocks.
//
// With anchor weights m and n_c - 1 = k positives, all that moves row i is one symmetric matrix:
//
//   g_i = 1/tau * sum over j != i of w_ij z_j,   w_ij = m_i e^(s_ij - lse_i) + m_j e^(s_ij - lse_j)
//                                                       - [same class] (m_i + m_j) / k
//
// w is symmetric, so each block of scores, computed once, serves both its rows and its columns: 3 N^2 D flops, not 4,
// and 2 where the scores were kept.
#pragma once
#include "sscl_forward.h"
#include "sscl_pairs.h"

SADCL_KERNELS_BEGIN

// Per row (padding rows: all zero): `anchor` and `pivot` give m_i e^(s_ij - lse_i) as anchor * 2^((z_i.z_j - pivot)
// scale), or, where scores are small (kFixedBound), as anchor * 2^(z_i.z_j scale); `pull` is m_i / k.
template <class T>
struct Anchors {
  Scratch<T> anchor, pivot, pull;
  double scale = 1;  // a power of two taken out of m, so that float32 does not limit how small or large m may be
  bool fixed;

  Anchors(Rows<T>& rows, const SsclBackward& args)
      : anchor(rows.panels * Rows<T>::P + 1), pivot(rows.panels * Rows<T>::P + 1), pull(rows.panels * Rows<T>::P + 1),
        fixed(fixed_pivot<T>(rows.bound)) {
    const T* grad = static_cast<const T*>(args.grad_rows.data);
    const T *pivots = static_cast<const T*>(args.lse), *log_sums = pivots + rows.V * rows.in.capacity;
    double largest = 0;
    for (int64_t i = 0; i < rows.panels * Rows<T>::P; ++i) {
      const bool active = i < rows.n && !(log_sums[i] == T(HUGE_VAL));
      anchor[i] = active ? grad[rows.offset(rows.place(i), args.grad_rows)] : T(0);
      if (fabs(double(anchor[i])) > largest) largest = fabs(double(anchor[i]));
    }
    if (largest > 0 && largest < HUGE_VAL) {
      int exponent;
      frexp(largest, &exponent);
      scale = ldexp(1.0, exponent);
    }
    for (int64_t i = 0; i < rows.panels * Rows<T>::P; ++i) {
      const double m = double(anchor[i]) / scale, log_sum = i < rows.n ? double(log_sums[i]) : HUGE_VAL;
      const Range same = i < rows.n ? rows.rows_of(rows.classes[i]) : Range{0, 1};
      pull[i] = T(same.last - same.first > 1 ? m / double(same.last - same.first - 1) : 0);
      pivot[i] = i < rows.n ? pivots[i] : T(0);
      const double outside = fixed ? log_sum + double(pivot[i]) / rows.in.temperature : log_sum;
      anchor[i] = T(log_sum == HUGE_VAL ? 0 : m * exp(-outside));
    }
  }
};

template <class T>
void softmax_weights(const Block<T>& block, Scale<T> scale, const Anchors<T>& anchors) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
  for (int jp = 0; jp < block.panels; ++jp)
    for (int v = 0; v < 3; ++v) {
      const int64_t j = block.j0 + jp * P + v * L;
      const vec<T> anchor_j = load(anchors.anchor.get() + j), pivot_j = load(anchors.pivot.get() + j);
      for (int i = 0; i < block.m; ++i) {
        T* w = block.at(jp, i) + v * L;
        const vec<T> s = load(w);
        const T anchor_i = anchors.anchor[block.i0 + i], pivot_i = anchors.pivot[block.i0 + i];
        if (anchors.fixed) {
          store(w, exp2<T>(s, scale) * (anchor_i + anchor_j));
        } else {  // s <= pivot but on the diagonal and for rows without a positive: the clamp; NaN passes
          const vec<T> x = s - pivot_i, y = s - pivot_j;
          store(w, exp2<T>(x > T(0) ? vec<T>{} : x, scale) * anchor_i +
                       exp2<T>(y > T(0) ? vec<T>{} : y, scale) * anchor_j);
        }
      }
    }
}

template <class T>
void subtract_positives(const Rows<T>& rows, const Block<T>& block, const Anchors<T>& anchors) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
  for_same_class(rows, block, [&](const Rect& r) {
    for (int jp = int(r.cols.first - block.j0) / P; jp * P < r.cols.last - block.j0; ++jp) {
      const LaneMask<T> mask(block, jp, r.cols);
      for (int v = 0; v < 3; ++v) {
        const vec<T> pull_j = load(anchors.pull.get() + block.j0 + jp * P + v * L);
        for (int64_t i = r.rows.first; i < r.rows.last; ++i) {
          T* w = block.at(jp, int(i - block.i0)) + v * L;
          store(w, load(w) - (mask.v[v] ? pull_j + anchors.pull[i] : vec<T>{}));
        }
      }
    }
  });
}

// z_i.z_j to w_ij, in place.
template <class T>
void to_weights(const Rows<T>& rows, const Block<T>& block, const Anchors<T>& anchors) {
  softmax_weights(block, Scale<T>(kLog2E / rows.in.temperature), anchors);
  subtract_positives(rows, block, anchors);
  block.set_diagonal(0);
}

template <class T>
void load_scores(const Block<T>& block, const T* square) {
  constexpr int P = Block<T>::P;
  const int64_t n = block.n;
  for (int jp = 0; jp < block.panels; ++jp)
    for (int i = 0; i < block.m; ++i) {
      const int64_t row = block.i0 + i, j = block.j0 + int64_t(jp) * P;
      T* s = block.at(jp, i);
      const int64_t count = row >= n ? 0 : n - j < P ? n - j : P;
      for (int64_t l = 0; l < P; ++l) s[l] = l < count ? square[row * n + j + l] : T(0);
    }
}

inline int64_t bytes_of(const Array& features) {  // [B, V, C, D]
  return features.shape[0] * features.shape[1] * features.shape[2] * features.shape[3] * element_size(features.dtype);
}

// Writes a stretch of a row, past the caches where the gradient is larger than they are: a line that is not in them
// would be read before it is written.
template <class T>
void write_stretch(const Array& out, int64_t at, int64_t count, bool streams, const T* x) {
  constexpr int L = Simd<T>::kLanes;
  T* to = static_cast<T*>(out.data) + at;
  if (!streams || count % L != 0 || out.dtype != own_dtype<T>() || reinterpret_cast<uintptr_t>(to) % 64 != 0)
    return write_row(out.data, out.dtype, at, count, x);
  for (int64_t d = 0; d < count; d += L) stream(to + d, load(x + d));
}

// Through the normalisation, dx = (g - z (z.g)) / |x|, and out to the rows of [B, V, C, D].
// Returns the panel's sum of z.g, without the factor `scale`.
template <class T>
double scatter_panel(Rows<T>& rows, int64_t panel, const SsclBackward& args, double scale, T* g) {
  constexpr int P = Rows<T>::P, kSlice = 64;
  const int64_t first = panel * P;
  const int lanes = int(rows.n - first < P ? rows.n - first : P);
  const bool streams = bytes_of(args.grad_features) >= kStream;
  double radial[P] = {}, factor[P] = {}, total = 0;
  alignas(64) T staging[P][kSlice + 16], made[P], before[kSlice];  // rows apart in the cache
  for (int64_t d = 0; d < rows.D; ++d) {
    const T* z = rows.numbers(panel, d, made);
    for (int l = 0; l < P; ++l) radial[l] += double(z[l]) * double(g[d * P + l]);
  }
  for (int l = 0; l < lanes; ++l) {
    total += radial[l];
    const double norm = args.norm[first + l];
    factor[l] = norm == 0 ? 0 : scale / norm;
    if (!rows.in.normalize) radial[l] = 0;
  }
  for (int64_t d0 = 0; d0 < rows.D; d0 += kSlice) {
    const int64_t count = rows.D - d0 < kSlice ? rows.D - d0 : kSlice;
    for (int64_t d = d0; d < d0 + count; ++d) {
      const T* z = rows.numbers(panel, d, made);
      for (int l = 0; l < P; ++l)
        g[d * P + l] = T(sscl_tangential(double(g[d * P + l]), double(z[l]), radial[l]) * factor[l]);
    }
    int64_t d = 0;
    for (; P % 8 == 0 && d + 8 <= count; d += 8) {
      const T* row[8];
      for (int k = 0; k < 8; ++k) row[k] = g + (d0 + d + k) * P;
      transpose_lanes<T>(row, P, kSlice + 16, staging[0] + d);
    }
    for (; d < count; ++d)
      for (int l = 0; l < lanes; ++l) staging[l][d] = g[(d0 + d) * P + l];
    for (int l = 0; l < lanes; ++l) {
      const Place place = rows.place(first + l);
      const int64_t out = rows.offset(place, args.grad_features) + d0;
      const bool adds = args.add_to_first && place.view == 0;
      if (adds) {
        read_row(args.grad_features, out, 1, count, before);
        for (int64_t k = 0; k < count; ++k) staging[l][k] += before[k];
      }
      write_stretch(args.grad_features, out, count, streams && !adds, staging[l]);
    }
  }
  stream_end();
  return total;
}

// gradients += w z, for both sides of every block. gradients: panels, as z.
template <class T>
void sweep_backward(Rows<T>& rows, Anchors<T>& anchors, const SsclBackward& args, T* gradients) {
  constexpr int P = Rows<T>::P;
  const Blocks<T> blocks(rows.panels, rows.threads);
  const Kept<T> kept(static_cast<T*>(const_cast<void*>(args.kept)), args.kept_size, blocks);
  const bool valid = kept.valid();
  Scratch<Workspace<T>> workspaces(rows.threads);
  for_all_pairs(blocks.count, rows.threads, [&](int64_t a, int64_t b) {
    Workspace<T>& ws = workspaces[thread_index()];
    const Block<T> block = block_of(rows, blocks, a, b, ws);
    const T* copy = valid ? kept.at(a, b) : nullptr;
    if (copy != nullptr) memcpy(ws.w, copy, size_t(kept.count(a, b)) * sizeof(T));
    else compute_scores(rows, block);
    to_weights(rows, block, anchors);
    T* to_i = gradients + block.i0 * rows.depth;
    T* to_j = gradients + block.j0 * rows.depth;
    if (block.diagonal())  // comes first for its rows
      memset(to_i, 0, size_t(block.m * rows.depth) * sizeof(T));
    if constexpr (kHasPairs && sizeof(T) == 4) {
      if (rows.paired) return mix_pairs(rows, block, ws.w_transposed, block.diagonal() ? nullptr : to_i, to_j);
    }
    const T* z_i = rows.panel(block.i0 / P);
    const T* z_j = rows.panel(block.j0 / P);
    if (block.diagonal()) {  // a symmetric block is its own transpose
      mix_panels(ws.w, block.panels, z_i, block.panels, rows.depth, to_i);
    } else {
      transpose_blocks(ws.w, block.panels, block.m / P, ws.w_transposed);
      mix_panels(ws.w_transposed, block.m / P, z_j, block.panels, rows.depth, to_i);
      mix_panels(ws.w, block.panels, z_i, block.m / P, rows.depth, to_j);
    }
  });
}

// The rows of the gradient that no active row is written to, zeroed in pieces.
template <class T>
class InactiveRows {
 public:
  InactiveRows(const Rows<T>& rows, const SsclBackward& args)
      : data_(static_cast<char*>(args.grad_features.data)), width_(rows.D * element_size(args.grad_features.dtype)),
        count_(args.grad_features.shape[0] * rows.V * rows.C), active_(count_ + 1) {
    first_ = args.add_to_first ? count_ / rows.V : 0;
    memset(active_.get(), 0, size_t(count_));
    for (int64_t i = 0; i < rows.n; ++i) active_[rows.offset(rows.place(i), args.grad_features) / rows.D] = 1;
  }
  int64_t pieces() const { return (count_ - first_ + kPiece - 1) / kPiece; }
  void zero(int64_t piece) const {
    const int64_t begin = first_ + piece * kPiece, end = begin + kPiece < count_ ? begin + kPiece : count_;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = row;
      while (row < end && !active_[row]) ++row;
      zero_part(data_ + from * width_, (row - from) * width_, count_ * width_ >= kStream);
    }
    stream_end();
  }

 private:
  static constexpr int64_t kPiece = 64;

  char* data_;
  int64_t width_, count_, first_ = 0;  // of rows, in the order of memory
  Scratch<uint8_t> active_;
};

// Few rows, scores at hand: a panel at a time from its weights to the gradient's rows, no rounds and nothing to
// transpose. Zeroing waits for memory and the products do not, so the two take turns in one queue.
template <class T>
void backward_from_square(Rows<T>& rows, Anchors<T>& anchors, const SsclBackward& args, double scale, double* radial) {
  constexpr int P = Rows<T>::P;
  const int64_t size = rows.panels * P * P, panel_size = rows.depth * P;
  const InactiveRows<T> inactive(rows, args);
  // Few rows may be active in a gradient that is worth a second thread's zeros.
  const int threads = inactive.pieces() > 4 ? team_size(rows.in.threads) : rows.threads;
  const int64_t tasks = rows.panels + inactive.pieces();
  Scratch<T> weights(threads * size), pairs(rows.paired ? threads * size : 1), gradients(threads * panel_size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = tasks - 1; task >= 0; --task) {  // a panel comes first, the shorter pieces last
    const int64_t p = task * rows.panels / tasks;
    if ((task + 1) * rows.panels / tasks == p) {
      inactive.zero(task - p);
      continue;
    }
    T* w = weights.get() + thread_index() * size;
    T* g = gradients.get() + thread_index() * panel_size;
    const Block<T> block = {0, p * P, rows.n, int(rows.panels) * P, 1, w};  // all rows against this panel's
    load_scores(block, static_cast<const T*>(args.kept));
    to_weights(rows, block, anchors);
    if (rows.paired) {
      memset(g, 0, size_t(panel_size) * sizeof(T));
      if constexpr (kHasPairs && sizeof(T) == 4)
        mix_pairs(rows, block, pairs.get() + thread_index() * size, nullptr, g);
    } else {
      mix_panel(w, rows.n - p * P, rows.z.get(), rows.n, rows.depth, g);
    }
    radial[p] = scatter_panel(rows, p, args, scale, g);
  }
}

template <class T>
void backward_by_blocks(Rows<T>& rows, Anchors<T>& anchors, const SsclBackward& args, double scale, double* radial) {
  const int64_t panel_size = rows.depth * Rows<T>::P;
  Scratch<T> gradients(rows.panels * panel_size);
  sweep_backward(rows, anchors, args, gradients.get());
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (int64_t p = 0; p < rows.panels; ++p)
    radial[p] = scatter_panel(rows, p, args, scale, gradients.get() + p * panel_size);
}

template <class T>
double backward(const SsclBackward& args) {
  const Array& out = args.grad_features;
  const int64_t bytes = bytes_of(out);
  if (bytes == 0) return 0;
  Rows<T> rows(args.rows, Rows<T>::kGradient);
  const int64_t kept = args.add_to_first ? bytes / out.shape[1] : 0;
  const bool fits = rows.n * rows.n <= kFewScores && rows.n * rows.n <= args.kept_size;
  want_huge_pages(out.data, size_t(bytes));
  gather(rows, const_cast<double*>(args.norm), true,
         {Fill{static_cast<char*>(out.data) + kept, fits ? 0 : bytes - kept}});
  Anchors<T> anchors(rows, args);
  const double tau = args.rows.temperature, scale = anchors.scale / tau;
  Scratch<double> radial(rows.panels + 1);
  fits ? backward_from_square(rows, anchors, args, scale, radial.get())
       : backward_by_blocks(rows, anchors, args, scale, radial.get());
  double total = 0;
  for (int64_t p = 0; p < rows.panels; ++p) total += radial[p];
  return -total * scale / (2 * tau);
}

SADCL_KERNELS_END
