// The gradient's product in bfloat16, where the processor multiplies it: rows as they are, weights rounded.
//
// What cancels in a row's sum are its positives, each of weight e - 1 / k, and all the others' e. The positives'
// weights are large and few, so the panels that hold any are split in two (w = high + low, 16 bits) and cost two
// products; the rest is rounded once, to 8 bits, far below what the gradient's own rounding to bfloat16 leaves of it.
#pragma once
#include "sscl_blocks.h"

SADCL_KERNELS_BEGIN

// A block's weights as pairs: `high`, and in panels that hold a positive what that leaves of them, `low`. Either side
// of the block in turn: its weights, made ready, are to be mixed before the other side's are.
class PairWeights {
 public:
  static constexpr int P = Tile<float>::P, L = Simd<float>::kLanes, kHalf = P / 2 * P;

  // room: [block.panels][block.m][P] numbers.
  PairWeights(const Rows<float>& rows, const Block<float>& block, float* room)
      : high(reinterpret_cast<Pair*>(room)), low(high + block.panels * block.m * P / 2), block(block),
        across(block.m / P) {
    memset(positive, 0, size_t(block.panels * across));
    for_same_class(rows, block, [&](const Rect& r) {
      for (int64_t jp = (r.cols.first - block.j0) / P; jp * P < r.cols.last - block.j0; ++jp)
        for (int64_t ip = (r.rows.first - block.i0) / P; ip * P < r.rows.last - block.i0; ++ip)
          positive[jp * across + ip] = 1;
    });
  }

  // w[jp][i][lane] times factor[i]: of pairs of rows i, to mix them into the lanes of each jp.
  void of_rows(const float* factor) {
    for (int jp = 0; jp < block.panels; ++jp)
      for (int ip = 0; ip < across; ++ip) {
        const int at = jp * across + ip;
        split[at] = positive[at];
        Pair *h = high + at * kHalf, *rest = low + at * kHalf;
        for (int i = 0; i < P; i += 2, h += P, rest += P)
          for (int v = 0; v < 3; ++v) {
            const float* w = block.at(jp, ip * P + i) + v * L;
            const FloatVec even = load(w) * factor[ip * P + i], odd = load(w + P) * factor[ip * P + i + 1];
            const PairVec rounded = pair_of(even, odd);
            store(h + v * L, rounded);
            if (split[at]) store(rest + v * L, pair_of(even - even_of(rounded), odd - odd_of(rounded)));
          }
      }
  }

  // The transpose: of pairs of lanes j, times factor[j], to mix them into the rows of each ip.
  void of_lanes(const float* factor) {
    constexpr int kRows = P % 8 == 0 ? 8 : 6;
    static_assert(P % kRows == 0, "rows of a panel go in groups");
    for (int ip = 0; ip < across; ++ip)
      for (int jp = 0; jp < block.panels; ++jp) {
        const int at = ip * block.panels + jp;
        split[at] = positive[jp * across + ip];
        for (int l = 0; l < P; l += kRows) {
          alignas(64) BFloat16 rounded[kRows][P], left[kRows][P];
          const Pair *h[8] = {}, *rest[8] = {};
          for (int r = 0; r < kRows; ++r) {
            const float* w = block.at(jp, ip * P + l + r);
            alignas(64) float scaled[P];
            for (int j = 0; j < P; ++j) scaled[j] = w[j] * factor[jp * P + j];
            narrow_row(scaled, P, rounded[r]);
            h[r] = reinterpret_cast<const Pair*>(rounded[r]), rest[r] = reinterpret_cast<const Pair*>(left[r]);
            if (!split[at]) continue;
            for (int j = 0; j < P; ++j) scaled[j] -= widen(rounded[r][j]);
            narrow_row(scaled, P, left[r]);
          }
          transpose_rows<P>(h, kRows, P / 2, high + at * kHalf + l);
          if (split[at]) transpose_rows<P>(rest, kRows, P / 2, low + at * kHalf + l);
        }
      }
  }

  // panels.h's mix_panels: y's panels hold pairs of rows, [depth][P / 2].
  void mix(int x_panels, const Pair* y, int y_panels, int64_t depth, float* out) const {
    constexpr int kMR = Tile<float>::kMR, kSlice = 128 / kMR * kMR, kStage = 96 / P,
                  kMost = 2 * Blocks<float>::kMaxPanels;
    struct Term {
      const Pair *w, *y;
    };
    for (int64_t d0 = 0; d0 < depth; d0 += kSlice) {
      const int64_t d1 = d0 + kSlice < depth ? d0 + kSlice : depth;
      for (int ip = 0; ip < x_panels; ++ip) {
        for (int j0 = 0; j0 < y_panels; j0 += kMost / 2) {
          Term terms[kMost];
          int count = 0;
          for (int jp = j0; jp < y_panels && jp < j0 + kMost / 2; ++jp) {
            const int at = ip * y_panels + jp;
            const Pair* rows = y + jp * depth * (P / 2);
            terms[count++] = {high + at * kHalf, rows};
            if (split[at]) terms[count++] = {low + at * kHalf, rows};
          }
          for (int64_t d = d0; d < d1; d += kMR)
            for (int t0 = 0; t0 < count; t0 += kStage) {
              Accumulators<float> acc;
              clear(acc);
              for (int t = t0; t < count && t < t0 + kStage; ++t)
                multiply_add<P / 2, 1>(acc, terms[t].y + d * (P / 2), terms[t].w, P / 2);
              add_to_tile(acc, out + (ip * depth + d) * P);
            }
        }
      }
    }
  }

 private:
  // A square of blocks, or a column of a few rows' panels.
  static constexpr int kSquare = Blocks<float>::kMaxPanels * Blocks<float>::kMaxPanels, kColumn = 512 / P + 1,
                       kPanels = kSquare > kColumn ? kSquare : kColumn;
  static_assert(int64_t(kColumn - 1) * P <= 512 && 512 * 512 == kFewScores, "few rows fit");

  Pair *high, *low;
  const Block<float>& block;
  int across;
  uint8_t positive[kPanels];  // [panels jp][panels ip]
  uint8_t split[kPanels];     // the same for the weights at hand
};

// gradients += w z, for the lanes of a block and, unless to_i is null, for its rows.
inline void mix_pairs(Rows<float>& rows, const Block<float>& block, float* room, float* to_i, float* to_j) {
  constexpr int P = PairWeights::P;
  const int64_t ip = block.i0 / P, jp = block.j0 / P;
  PairWeights weights(rows, block, room);
  weights.of_rows(rows.remainder.get() + block.i0);
  weights.mix(block.panels, rows.row_pair_panel(ip), block.m / P, rows.depth, to_j);
  if (to_i == nullptr) return;
  weights.of_lanes(rows.remainder.get() + block.j0);
  weights.mix(block.m / P, rows.row_pair_panel(jp), block.panels, rows.depth, to_i);
}

SADCL_KERNELS_END
