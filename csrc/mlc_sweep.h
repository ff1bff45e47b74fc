// What a sweep over pairs does with a block: the sums of the loss, and the moves of the gradient.
#pragma once
#include "mlc_weights.h"

SADCL_KERNELS_BEGIN

template <class T>
void add_to_block(const Block<T>& block, T value) {
  const int64_t count = int64_t(block.m) * block.panels * Block<T>::P;
  for (int64_t k = 0; k < count; ++k) block.w[k] += value;
}

// tau log b_j, in units of z_i.z_j.
template <class T>
T factor_of(const MlcInputs& in, int segment) {
  return in.weighting != kMsc || segment == kPrototypes ? T(0) : T(in.temperature * ::log(in.beta));
}

// Of the forward, per anchor.
template <class T>
struct Sums {
  Statistics<T> stats;
  Tally tally;
  explicit Sums(const Vectors<T>& v) : stats(v.padded()), tally(v.padded()) { stats.fixed = fixed_pivot<T>(v.bound); }
};

// A block of z_i.z_j to the sums, which spoils it. Without room for weights: to those of exponentials alone.
template <class T>
void add_scores(const Vectors<T>& v, const Pairs<T>& pairs, const Block<T>& block, int segment, Scale<T> scale,
                Weights<T>* tile, Workspace<T>& ws, Sums<T>& to) {
  const bool square = segment == kAnchors;
  if (square) block.set_diagonal(0);
  if (tile != nullptr) {
    const Weights<T>& weights = tile->fill(v, pairs, block, segment);
    add_terms(block, square, weights, ws, to.stats.positive, [](vec<T> s, vec<T> f) { return s * f; });
    add_sums_of_weights(pairs, block, square, weights, ws, to.tally);
  }
  const T factor = factor_of<T>(v.in, segment);
  if (factor != 0) add_to_block(block, factor);
  set_strangers(v, block, segment, T(-HUGE_VAL));
  Block<T> one_way = block;  // only its rows are anchors: as if it lay on the diagonal
  if (!square) one_way.j0 = block.i0;
  to.stats.fixed ? add_exponentials(one_way, scale, ws, to.stats)
                 : add_exponentials_online(one_way, scale, ws, to.stats);
}

// Per vector that is an anchor (else zero): push * e^((z_i.z_j - shift) / tau) is m lam e^(s - lse), pull is m share.
template <class T>
struct Moves {
  Scratch<T> push, shift, pull;
  bool fixed;

  Moves(int64_t padded, bool fixed) : push(padded + 1), shift(padded + 1), pull(padded + 1), fixed(fixed) {
    for (int64_t i = 0; i < padded; ++i) push[i] = shift[i] = pull[i] = 0;
  }
};

// z_i.z_j to G_ij (`square`, columns are anchors: + G_ji), in place; returns the sum of G_ij z_i.z_j. Without the
// weights: W = 0.
template <bool kPulls, class T>
double to_moves(const Block<T>& block, bool square, const Moves<T>& moves, const Weights<T>* weights, T factor,
                Scale<T> scale) {
  constexpr int P = Block<T>::P, L = Block<T>::L;
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
        if constexpr (kPulls) {
          g -= load(weights->forth + at) * moves.pull[block.i0 + i];
          if (square) g -= load(weights->other() + at) * pull_j;
        }
        sums += g * s;
        store(block.w + at, g);
      }
      total += double(sum<T>(sums));
    }
  return total;
}

SADCL_KERNELS_END
