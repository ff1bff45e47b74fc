// Weights of pairs by blocks, and what is summed of them.
#pragma once
#include "mlc_pairs.h"

SADCL_KERNELS_BEGIN

// What is no column, or no anchor, in a block that is laid out as `block`.
template <class T>
void set_strangers(const Vectors<T>& v, const Block<T>& block, int segment, T value) {
  constexpr int P = Block<T>::P;
  const Segment& s = v.segments[segment];
  const int64_t columns = s.first * P + s.rows, j1 = block.j0 + int64_t(block.panels) * P;
  for (int64_t i = block.i0; i < block.i0 + block.m; ++i)
    for (int64_t j = i < v.anchors().rows ? (columns > block.j0 ? columns : block.j0) : block.j0; j < j1; ++j)
      block.score(i, j) = value;
  if (segment == kAnchors) block.set_diagonal(value);
  if (segment == kKeys && v.in.peers != nullptr)
    for (int64_t i = block.i0; i < block.i0 + block.m; ++i) {
      const int64_t self = s.first * P + v.in.peers->own + i;
      if (self >= block.j0 && self < j1) block.score(i, self) = value;
    }
}

// f_ij of a block, and f_ji where that is another number.
template <class T>
struct Weights {
  alignas(64) T forth[Workspace<T>::kSquare];
  alignas(64) T back[Workspace<T>::kSquare];
  bool same;  // f_ji = f_ij

  const T* other() const { return same ? forth : back; }

  const Weights& fill(const Vectors<T>& v, const Pairs<T>& pairs, Block<T> block, int segment) {
    same = !pairs.both_ways(segment);
    pairs.fill(block, segment, forth, back);
    block.w = forth;
    set_strangers(v, block, segment, T(0));
    block.w = back;
    if (!same) set_strangers(v, block, segment, T(0));
    return *this;
  }
};

// Per anchor, over the columns: f, and how many are positives.
struct Tally {
  Scratch<double> total, count;
  explicit Tally(int64_t n) : total(n + 1), count(n + 1) {
    for (int64_t i = 0; i < n; ++i) total[i] = count[i] = 0;
  }
};

// to[i] += sum over j of term(s_ij, f_ij), and in a block of anchors the same for j.
template <class T, class Term>
void add_terms(const Block<T>& block, bool square, const Weights<T>& weights, Workspace<T>& ws, Scratch<double>& to,
               Term term) {
  const auto add = [&](const T* f) {
    sums(block, 0, block.panels, 0, block.m, ws.lanes, ws.row_sums, ws.col_sums, [&](vec<T> s, int i, int jp, int q) {
      return term(s, load(f + (int64_t(jp) * block.m + i) * Block<T>::P + q * Block<T>::L));
    });
  };
  add(weights.forth);
  for (int i = 0; i < block.m; ++i) to[block.i0 + i] += ws.row_sums[i];
  if (!square || block.diagonal()) return;
  if (!weights.same) add(weights.back);
  for (int j = 0; j < block.panels * Block<T>::P; ++j) to[block.j0 + j] += ws.col_sums[j];
}

template <class T>
void add_sums_of_weights(const Pairs<T>& pairs, const Block<T>& block, bool square, const Weights<T>& weights,
                         Workspace<T>& ws, Tally& tally) {
  if (pairs.totals_wanted()) add_terms(block, square, weights, ws, tally.total, [](vec<T>, vec<T> f) { return f; });
  if (pairs.counts_wanted())
    add_terms(block, square, weights, ws, tally.count, [](vec<T>, vec<T> f) { return Pairs<T>::counted(f); });
}

// What the forward says of an anchor.
template <class T>
void write_anchor(const MlcForward& args, const Pairs<T>& pairs, int64_t i, double lse, double positive) {
  const double pull = double(pairs.share[i]) * positive / args.in.temperature;
  args.lse[i] = pairs.active[i] ? lse : HUGE_VAL;
  static_cast<T*>(args.row_loss)[i] = pairs.active[i] ? T(pairs.lam[i] * lse - pull) : T(0);
}

SADCL_KERNELS_END
