// Labels as bits in 64-bit words, and what two images share of them.
#pragma once
#include "tiles.h"

SADCL_KERNELS_BEGIN

// Two planes [words][rows]: who has a class, who ignores it. Beyond the last class all ignore.
struct LabelWords {
  uint64_t* at;
  int words, rows;
  SADCL_INLINE uint64_t* of(int plane, int word) const { return at + (int64_t(plane) * words + word) * rows; }
};

// A warp packs row `row` of the words from labels of C classes.
template <class L>
SADCL_INLINE void pack_labels(const LabelWords& to, int row, const L* labels, int64_t stride, int C) {
  for (int word = 0; word < to.words; ++word) {
    uint64_t has = 0, ignores = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = word * 64 + half * 32 + lane(), y = c < C ? target_of(labels[c * stride]) : -1;
      has |= uint64_t(__ballot_sync(kAll, y == 1)) << (half * 32);
      ignores |= uint64_t(__ballot_sync(kAll, y == -1)) << (half * 32);
    }
    if (lane() == 0) {
      to.of(0, word)[row] = has;
      to.of(1, word)[row] = ignores;
    }
  }
}

// Classes that both have, the first alone, the second alone; whether there is one that both know. What either ignores
// is in none.
struct Counts {
  int both = 0, first = 0, second = 0;
  bool known = false;
};
SADCL_INLINE Counts counts_of(const LabelWords& words, int a, int b) {
  Counts c;
  for (int w = 0; w < words.words; ++w) {
    const uint64_t has_a = words.of(0, w)[a], has_b = words.of(0, w)[b];
    const uint64_t hidden_a = words.of(1, w)[a], hidden_b = words.of(1, w)[b];
    c.both += __popcll(has_a & has_b);
    c.first += __popcll(has_a & ~(has_b | hidden_b));
    c.second += __popcll(has_b & ~(has_a | hidden_a));
    c.known |= ~(hidden_a | hidden_b) != 0;
  }
  return c;
}

SADCL_KERNELS_END
