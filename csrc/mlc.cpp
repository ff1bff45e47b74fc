// Image-level multi-label contrastive losses, compiled once per instruction set. Read in this order: panels.h,
// sscl_blocks.h, sscl_forward.h (whose sums of exponentials these are), mlc_vectors.h (segments, sweep), mlc_pairs.h
// (weights of pairs), mlc_weights.h (blocks of them), mlc_sweep.h (what is done with a block), mlc_classes.h
// (mulsupcon, which needs no weights), mlc_stream.h (keys that pass by once), group_rows_sweep.h (rows of other ranks).
//
// Forward: one sweep for lse and T_i = sum_j W_ij s_ij. Backward: one sweep; with m the upstream gradients,
//
//   G_ij = m_i (lam_i b_j e^(s_ij - lse_i) - W_ij)
//
// moves anchor i by sum_j G_ij z_j / tau and column j by sum_i G_ij z_i / tau. Between anchors a block serves both
// sides.
#include "group_rows_sweep.h"
#include "mlc_stream.h"

SADCL_KERNELS_BEGIN
namespace {

// Where the parts lie of what is kept with the batch among the columns.
template <class T>
struct KeptParts {
  bool room;  // for anything
  T *sums, *terms, *scores;
  int64_t size;  // of scores

  KeptParts(const MlcInputs& in, const void* kept, int64_t kept_size) {
    const int64_t n = in.features.shape[0] * in.features.shape[1];
    const int64_t table = in.weighting == kMsc ? n * in.labels.shape[1] : 0;
    room = in.include_batch && kept_size >= 2 * n;
    const bool both = room && table > 0 && kept_size >= 2 * n + table;
    sums = static_cast<T*>(const_cast<void*>(kept));
    terms = both ? sums + 2 * n : nullptr;
    scores = sums + (room ? 2 * n : 0) + (both ? table : 0);
    size = room ? kept_size - (scores - sums) : 0;
  }
};

template <class T>
bool forward(const MlcForward& args) {
  const MlcInputs& in = args.in;
  if (streams(in, args.kept_size)) {
    const bool done = forward_in_one_sweep<T>(args);
    if (!done || static_cast<T*>(args.kept)[0] == T(1)) return done;
  }
  Vectors<T> v(in, Vectors<T>::kScoresAlone);
  v.gather(args.norm, nullptr);
  Pairs<T> pairs(v);
  if (!pairs.valid) return false;
  const KeptParts<T> kept(in, args.kept, args.kept_size);
  if (!kept.room && args.kept_size > 0) memset(args.kept, 0, size_t(args.kept_size) * sizeof(T));
  if (kept.terms != nullptr) pairs.give_terms(kept.terms);
  const Scale<T> scale(kLog2E / in.temperature);
  Sums<T> sums(v);
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  const int64_t N = v.anchors().rows;
  const bool by_classes = pairs.by_classes();
  if (by_classes) pull_by_classes(v, pairs, sums.stats.positive.get());
  sweep(v, workspaces, {true, kept.scores, kept.size, true}, [&](const Block<T>& block, int segment, Workspace<T>& ws) {
    add_scores(v, pairs, block, segment, scale, by_classes ? nullptr : &tiles[thread_index()], ws, sums);
  });
  const Statistics<T>& stats = sums.stats;
  const Tally& tally = sums.tally;
  for (int64_t i = 0; i < N; ++i) {
    if (pairs.sums_wanted()) pairs.settle(i, tally.total[i], tally.count[i]);
    const double peak = stats.fixed || stats.peak[i] == T(-HUGE_VAL) ? 0 : double(stats.peak[i]) / in.temperature;
    write_anchor(args, pairs, i, peak + ::log(stats.sum[i]), stats.positive[i]);
    if (kept.room) kept.sums[i] = T(pairs.lam[i]), kept.sums[N + i] = pairs.share[i];
  }
  return true;
}

// Of the upstream gradients and the forward's statistics.
template <class T>
bool fill_moves(const Vectors<T>& v, const Pairs<T>& pairs, const MlcBackward& args, Moves<T>& moves) {
  const Array& grad = args.grad_rows;
  const double tau = args.in.temperature;
  bool someone = false;
  for (int64_t i = 0; i < v.anchors().rows; ++i) {
    if (args.lse[i] == HUGE_VAL) continue;
    someone = true;
    const double m = static_cast<const T*>(grad.data)[i / v.V * grad.stride[0] + i % v.V * grad.stride[1]];
    if (!moves.fixed) moves.shift[i] = T(args.lse[i] * tau);
    moves.push[i] = T(m * pairs.lam[i] * ::exp(double(moves.shift[i]) / tau - args.lse[i]));
    moves.pull[i] = T(m * double(pairs.share[i]));
  }
  return someone;
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

// lam and share of the forward: as kept, or by another sweep over the labels.
template <class T>
void restore(Vectors<T>& v, Pairs<T>& pairs, const KeptParts<T>& kept) {
  if (!pairs.sums_wanted()) return;
  const int64_t N = v.anchors().rows;
  if (kept.room) {
    for (int64_t i = 0; i < N; ++i) pairs.lam[i] = double(kept.sums[i]), pairs.share[i] = kept.sums[N + i];
    return;
  }
  Tally tally(v.padded());
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  sweep(v, workspaces, Scores<T>{false}, [&](const Block<T>& block, int segment, Workspace<T>& ws) {
    const Weights<T>& weights = tiles[thread_index()].fill(v, pairs, block, segment);
    add_sums_of_weights(pairs, block, segment == kAnchors, weights, ws, tally);
  });
  for (int64_t i = 0; i < N; ++i) pairs.settle(i, tally.total[i], tally.count[i]);
}

template <class T>
double backward(const MlcBackward& args) {
  constexpr int P = Vectors<T>::P;
  const MlcInputs& in = args.in;
  const Array* outs[kSegments] = {&args.grad_features, &args.grad_keys, &args.grad_prototypes};
  if (streams(in, args.kept_size) && static_cast<const T*>(args.kept)[0] == T(1) && outs[kKeys]->dims == 0)
    return backward_of_one_sweep<T>(args);
  Vectors<T> v(in);
  v.gather(const_cast<double*>(args.norm), args.lse);
  const KeptParts<T> kept(in, args.kept, args.kept_size);
  Pairs<T> pairs(v, kept.terms);
  restore(v, pairs, kept);
  Moves<T> moves(v.padded(), fixed_pivot<T>(v.bound));
  if (!fill_moves(v, pairs, args, moves)) {
    for (int s = 0; s < kSegments; ++s) {
      const int64_t bytes = v.segments[s].rows * v.D * element_size(outs[s]->dtype);
      if (outs[s]->dims && bytes > 0) memset(outs[s]->data, 0, size_t(bytes));
    }
    return 0;
  }
  int64_t last = 0;  // panels of gradients up to the last segment that is wanted
  for (int s = 0; s < kSegments; ++s)
    if (outs[s]->dims) last = v.segments[s].first + v.segments[s].panels;
  const int64_t N = v.anchors().rows;
  Scratch<T> gradients(last * v.depth * P + 1);
  memset(gradients.get(), 0, size_t(last * v.depth * P) * sizeof(T));
  Scratch<Workspace<T>> workspaces(v.threads);
  Scratch<Weights<T>> tiles(v.threads);
  Scratch<double> radial(v.anchors().panels + 1);  // by a block's first panel: no two tasks of a round share it
  for (int64_t p = 0; p < v.anchors().panels; ++p) radial[p] = 0;
  const Scale<T> scale(kLog2E / in.temperature);
  const bool by_classes = pairs.by_classes();
  Scratch<double> positive(by_classes ? N + 1 : 1);
  if (by_classes) {
    const bool wanted[kSegments] = {outs[kAnchors]->dims > 0, outs[kKeys]->dims > 0, false};
    pull_by_classes(v, pairs, positive.get(), moves.pull.get(), gradients.get(), wanted);
  }
  sweep(v, workspaces, {true, kept.scores, kept.size, false},
        [&](const Block<T>& block, int segment, Workspace<T>& ws) {
          const bool square = segment == kAnchors;
          if (square) block.set_diagonal(0);
          const T factor = factor_of<T>(in, segment);
          const double moved =
              by_classes ? to_moves<false, T>(block, square, moves, nullptr, factor, scale)
                         : to_moves<true, T>(block, square, moves,
                                             &tiles[thread_index()].fill(v, pairs, block, segment), factor, scale);
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
  for (int64_t i = 0; by_classes && i < N; ++i)
    if (moves.pull[i] != T(0)) total -= double(moves.pull[i]) * positive[i];
  return -total / (in.temperature * in.temperature);
}

}  // namespace

bool mlc_forward(const MlcForward& args) { return SADCL_BY_DTYPE(mlc_forward, forward, args.in.features.dtype, args); }

double mlc_backward(const MlcBackward& args) {
  return SADCL_BY_DTYPE(mlc_backward, backward, args.in.features.dtype, args);
}

bool group_rows_forward(const GroupRowsForward& args) {
  return SADCL_BY_DTYPE(group_rows_forward, forward_of_own_rows, args.in.features.dtype, args);
}

void group_rows_backward(const GroupRowsBackward& args) {
  SADCL_BY_DTYPE(group_rows_backward, backward_of_own_rows, args.in.features.dtype, args);
}

SADCL_KERNELS_END
