// Image-level multi-label contrastive losses, compiled once per instruction set. Read in this order: panels.h,
// sscl_blocks.h, sscl_forward.h (whose sums of exponentials these are), mlc_vectors.h (segments, sweep), mlc_pairs.h
// (weights of pairs).
//
// Forward: one sweep for lse and T_i = sum_j W_ij s_ij. Backward: one sweep; with m the upstream gradients,
//
//   G_ij = m_i (lam_i b_j e^(s_ij - lse_i) - W_ij)
//
// moves anchor i by sum_j G_ij z_j / tau and column j by sum_i G_ij z_i / tau. Between anchors a block serves both
// sides.
#include "mlc_pairs.h"

SADCL_KERNELS_BEGIN
namespace {

// Two more blocks: f_ij and f_ji.
template <class T>
struct Weights {
  alignas(64) T forth[Workspace<T>::kSquare];
  alignas(64) T back[Workspace<T>::kSquare];
};

template <class T>
void add_to_block(const Block<T>& block, T value) {
  const int64_t count = int64_t(block.m) * block.panels * Block<T>::P;
  for (int64_t k = 0; k < count; ++k) block.w[k] += value;
}

// What is no column, or no anchor: -inf.
template <class T>
void mask(const Vectors<T>& v, const Block<T>& block, int segment) {
  constexpr int P = Block<T>::P;
  const Segment& s = v.segments[segment];
  const int64_t columns = s.first * P + s.rows, j1 = block.j0 + int64_t(block.panels) * P;
  for (int64_t i = block.i0; i < block.i0 + block.m; ++i)
    for (int64_t j = i < v.anchors().rows ? (columns > block.j0 ? columns : block.j0) : block.j0; j < j1; ++j)
      block.score(i, j) = T(-HUGE_VAL);
  if (segment == kAnchors) block.set_diagonal(T(-HUGE_VAL));
}

// tau log b_j, in units of z_i.z_j.
template <class T>
T factor_of(const MlcInputs& in, int segment) {
  return in.weighting != kMsc || segment == kPrototypes ? T(0) : T(in.temperature * ::log(in.beta));
}

template <class T>
bool forward(const MlcForward& args) {
  const MlcInputs& in = args.in;
  Vectors<T> v(in);
  v.gather(args.norm, nullptr);
  const Pairs<T> pairs(v);
  if (!pairs.valid) return false;
  const double scale_of = kLog2E / in.temperature;
  const Scale<T> scale(scale_of);
  Statistics<T> stats(v.padded());
  stats.fixed = v.bound <= kFixedBound;
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  sweep(v, workspaces, [&](Block<T> block, int segment, Workspace<T>& ws) {
    Weights<T>& weights = tiles[thread_index()];
    const bool square = segment == kAnchors, twice = square && !block.diagonal();
    if (square) block.set_diagonal(0);
    pairs.fill(block, segment, weights.forth, weights.back);
    Block<T> one_way = block;  // only its rows are anchors: as if it lay on the diagonal
    if (!square) one_way.j0 = block.i0;
    const auto products = [&](const T* f) {
      sums(block, 0, block.panels, 0, block.m, ws.lanes, ws.row_sums, ws.col_sums, [&](vec<T> s, int i, int jp, int q) {
        return s * load(f + (int64_t(jp) * block.m + i) * Block<T>::P + q * Block<T>::L);
      });
    };
    products(weights.forth);
    for (int i = 0; i < block.m; ++i) stats.positive[block.i0 + i] += ws.row_sums[i];
    if (twice) {
      if (!pairs.symmetric()) products(weights.back);
      for (int j = 0; j < block.panels * Block<T>::P; ++j) stats.positive[block.j0 + j] += ws.col_sums[j];
    }
    const T factor = factor_of<T>(in, segment);
    if (factor != 0) add_to_block(block, factor);
    mask(v, block, segment);
    stats.fixed ? add_exponentials(one_way, scale, ws, stats) : add_exponentials_online(one_way, scale, ws, stats);
  });
  for (int64_t i = 0; i < v.anchors().rows; ++i) {
    const double peak = stats.fixed || stats.peak[i] == T(-HUGE_VAL) ? 0 : double(stats.peak[i]) / in.temperature;
    const double lse = peak + ::log(stats.sum[i]);
    args.lse[i] = pairs.active[i] ? lse : HUGE_VAL;
    const double pull = double(pairs.share[i]) * stats.positive[i] / in.temperature;
    static_cast<T*>(args.row_loss)[i] = pairs.active[i] ? T(pairs.lam[i] * lse - pull) : T(0);
  }
  return true;
}

// Per anchor (padding: zero): push * e^((z_i.z_j - shift) / tau) is m lam e^(s - lse), pull is m share.
template <class T>
struct Moves {
  Scratch<T> push, shift, pull;
  bool fixed, someone = false;

  Moves(const Vectors<T>& v, const Pairs<T>& pairs, const MlcBackward& args)
      : push(v.padded() + 1), shift(v.padded() + 1), pull(v.padded() + 1), fixed(v.bound <= kFixedBound) {
    const Array& grad = args.grad_rows;
    const double tau = args.in.temperature;
    for (int64_t i = 0; i < v.padded(); ++i) {
      push[i] = shift[i] = pull[i] = 0;
      if (i >= v.anchors().rows || args.lse[i] == HUGE_VAL) continue;
      someone = true;
      const double m = static_cast<const T*>(grad.data)[i / v.V * grad.stride[0] + i % v.V * grad.stride[1]];
      if (!fixed) shift[i] = T(args.lse[i] * tau);
      push[i] = T(m * pairs.lam[i] * ::exp(double(shift[i]) / tau - args.lse[i]));
      pull[i] = T(m * double(pairs.share[i]));
    }
  }
};

// z_i.z_j to G_ij (+ G_ji between anchors), in place; returns the sum of G_ij z_i.z_j.
template <class T>
double to_moves(const Block<T>& block, bool square, const Moves<T>& moves, const Weights<T>& weights, bool symmetric,
                T factor, Scale<T> scale) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
  const T* back = symmetric ? weights.forth : weights.back;
  double total = 0;
  for (int jp = 0; jp < block.panels; ++jp)
    for (int q = 0; q < 3; ++q) {
      const int64_t j = block.j0 + int64_t(jp) * P + q * L;
      const vec<T> zero = {};
      const vec<T> push_j = square ? load(moves.push.get() + j) : zero,
                   pull_j = square ? load(moves.pull.get() + j) : zero;
      const vec<T> shift_j = square ? load(moves.shift.get() + j) : zero;
      vec<T> sums = {};
      for (int i = 0; i < block.m; ++i) {
        const int64_t at = (int64_t(jp) * block.m + i) * P + q * L;
        const vec<T> s = load(block.w + at), shifted = s + factor;
        const T push_i = moves.push[block.i0 + i], shift_i = moves.shift[block.i0 + i];
        vec<T> g;
        if (moves.fixed) {
          g = exp2<T>(shifted, scale) * (push_i + push_j);
        } else {  // s <= lse but for rounding; the clamp keeps exp2 in its domain and lets NaN pass
          const vec<T> x = shifted - shift_i;
          g = exp2<T>(x > T(0) ? zero : x, scale) * push_i;
          if (square) {
            const vec<T> y = shifted - shift_j;
            g += exp2<T>(y > T(0) ? zero : y, scale) * push_j;
          }
        }
        g -= load(weights.forth + at) * moves.pull[block.i0 + i];
        if (square) g -= load(back + at) * pull_j;
        sums += g * s;
        store(block.w + at, g);
      }
      total += double(sum<T>(sums));
    }
  return total;
}

// dx = (g - z (z.g)) / |x| / tau of a segment's vectors, out to its array.
template <class T>
void scatter(Vectors<T>& v, const MlcBackward& args, int segment, const Array& out, const T* gradients) {
  constexpr int P = Vectors<T>::P;
  const Segment& s = v.segments[segment];
  const int64_t D = v.D;
  Scratch<T> rows(v.threads * (D + 1));
#pragma omp parallel for num_threads(v.threads) schedule(static)
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* z = v.panel(s.first + r / P) + r % P;
    const T* g = gradients + (s.first + r / P) * v.depth * P + r % P;
    T* row = rows.get() + thread_index() * (D + 1);
    double radial = 0;
    if (args.in.normalize)
      for (int64_t d = 0; d < D; ++d) radial += double(z[d * P]) * double(g[d * P]);
    const double norm = args.norm[s.before + r];
    const bool left_out = segment == kAnchors && !args.in.include_batch && args.lse[r] == HUGE_VAL;
    const double factor = norm == 0 || left_out ? 0 : 1 / (norm * args.in.temperature);
    for (int64_t d = 0; d < D; ++d)
      row[d] = factor == 0 ? T(0) : T((double(g[d * P]) - double(z[d * P]) * radial) * factor);
    write_row(out.data, out.dtype, r * D, D, row);
  }
}

template <class T>
double backward(const MlcBackward& args) {
  constexpr int P = Vectors<T>::P;
  const MlcInputs& in = args.in;
  Vectors<T> v(in);
  v.gather(const_cast<double*>(args.norm), args.lse);
  const Pairs<T> pairs(v);
  const Moves<T> moves(v, pairs, args);
  const Array* outs[kSegments] = {&args.grad_features, &args.grad_keys, &args.grad_prototypes};
  if (!moves.someone) {
    for (int s = 0; s < kSegments; ++s) {
      const int64_t bytes = v.segments[s].rows * v.D * element_size(outs[s]->dtype);
      if (outs[s]->dims && bytes > 0) memset(outs[s]->data, 0, size_t(bytes));
    }
    return 0;
  }
  int64_t last = 0;  // panels of gradients up to the last segment that is wanted
  for (int s = 0; s < kSegments; ++s)
    if (outs[s]->dims) last = v.segments[s].first + v.segments[s].panels;
  Scratch<T> gradients(last * v.depth * P + 1);
  memset(gradients.get(), 0, size_t(last * v.depth * P) * sizeof(T));
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  Scratch<double> radial(v.anchors().panels + 1);  // by a block's first panel: no two tasks of a round share it
  for (int64_t p = 0; p < v.anchors().panels; ++p) radial[p] = 0;
  const Scale<T> scale(kLog2E / in.temperature);
  sweep(v, workspaces, [&](const Block<T>& block, int segment, Workspace<T>& ws) {
    Weights<T>& weights = tiles[thread_index()];
    const bool square = segment == kAnchors;
    if (square) block.set_diagonal(0);
    pairs.fill(block, segment, weights.forth, weights.back);
    const double moved = to_moves(block, square, moves, weights, pairs.symmetric(), factor_of<T>(in, segment), scale);
    radial[block.i0 / P] += square && block.diagonal() ? moved / 2 : moved;
    if (square) block.set_diagonal(0);
    T* to_i = gradients.get() + block.i0 * v.depth;
    T* to_j = gradients.get() + block.j0 * v.depth;
    const T *z_i = v.panel(block.i0 / P), *z_j = v.panel(block.j0 / P);
    if (outs[kAnchors]->dims) {
      transpose_blocks(ws.w, block.panels, block.m / P, ws.w_transposed);
      mix_panels(ws.w_transposed, block.m / P, z_j, block.panels, v.depth, to_i);
    }
    if (outs[segment]->dims && !(square && block.diagonal()))
      mix_panels(ws.w, block.panels, z_i, block.m / P, v.depth, to_j);
  });
  for (int s = 0; s < kSegments; ++s)
    if (outs[s]->dims && v.D > 0) scatter(v, args, s, *outs[s], gradients.get());
  double total = 0;
  for (int64_t p = 0; p < v.anchors().panels; ++p) total += radial[p];
  return -total / (in.temperature * in.temperature);
}

}  // namespace

bool mlc_forward(const MlcForward& args) { return SADCL_BY_DTYPE(mlc_forward, forward, args.in.features.dtype, args); }

double mlc_backward(const MlcBackward& args) {
  return SADCL_BY_DTYPE(mlc_backward, backward, args.in.features.dtype, args);
}

SADCL_KERNELS_END
