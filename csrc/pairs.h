// Rows on their way into panels: transposed, as numbers or as pairs of bfloat16.
#pragma once
#include "matmul_pack.h"
#include "panels.h"

SADCL_KERNELS_BEGIN

// out[k][lane] = row[lane][k] for 8 lanes, or for fewer where panels of P lanes are not made of eights.
template <int P, class E>
SADCL_INLINE void transpose_rows(const E* const (&row)[8], int lanes, int depth, E* out) {
  if constexpr (P % 8 == 0 && sizeof(E) == 4) {
    const float* at[8];
    for (int l = 0; l < 8; ++l) at[l] = reinterpret_cast<const float*>(row[l]);
    transpose_lanes<float>(at, depth, P, reinterpret_cast<float*>(out));
  } else {
    for (int k = 0; k < depth; ++k)
      for (int l = 0; l < lanes; ++l) memcpy(out + k * P + l, row[l] + k, sizeof(E));
  }
}

// Calls make(row, k0, n) for rows of E to be transposed into out [depth][P], eight rows by up to kCut at a time (so
// that what is written, eight lanes at a time, stays in L1); it returns where the n of them lie.
constexpr int kCut = 64;
template <int P, class E, class Make>
SADCL_INLINE void pack_rows(int64_t depth, E* out, Make make) {
  for (int64_t k0 = 0; k0 < depth; k0 += kCut)
    for (int l0 = 0; l0 < P; l0 += 8) {
      const int n = int(depth - k0 < kCut ? depth - k0 : kCut), lanes = P - l0 < 8 ? P - l0 : 8;
      const E* row[8] = {};
      for (int l = 0; l < lanes; ++l) row[l] = make(l0 + l, k0, n);
      transpose_rows<P>(row, lanes, n, out + k0 * P + l0);
    }
}

// Rows of a panel, `lanes` of them, `pitch` apart and D long, k-major; the rest is zero.
template <class T>
void pack_numbers(const T* rows, int64_t pitch, int lanes, int64_t D, int64_t depth, T* out) {
  constexpr int P = Tile<T>::P;
  alignas(64) static const T zeros[kCut] = {};
  pack_rows<P>(D, out, [&](int l, int64_t k0, int) { return l < lanes ? rows + l * pitch + k0 : zeros; });
  memset(out + D * P, 0, size_t((depth - D) * P) * sizeof(T));
}

// Rows that hold bfloat16 numbers, as pairs of neighbours in depth: out[k][lane] = (row[2k], row[2k + 1]).
inline void pack_pairs(const float* rows, int64_t pitch, int lanes, int64_t D, int64_t depth, Pair* out) {
  constexpr int P = Tile<float>::P;
  alignas(64) BFloat16 narrow[8][2 * kCut];
  pack_rows<P>(depth, out, [&](int l, int64_t k0, int n) {
    BFloat16* to = narrow[l % 8];
    int64_t count = l < lanes ? D - 2 * k0 : 0;
    count = count < 0 ? 0 : count < 2 * n ? count : 2 * n;
    if (count > 0) narrow_row(rows + l * pitch + 2 * k0, int(count), to);
    memset(to + count, 0, size_t(2 * n - count) * sizeof(BFloat16));
    return reinterpret_cast<const Pair*>(to);
  });
}

// The same numbers as pairs of neighbouring rows: out[d][lane] = (row[2 lane][d], row[2 lane + 1][d]).
inline void pack_row_pairs(const float* rows, int64_t pitch, int lanes, int64_t D, int64_t depth, Pair* out) {
  constexpr int P = Tile<float>::P;
  alignas(64) Pair both[8][kCut];
  memset(both, 0, sizeof both);
  pack_rows<P / 2>(D, out, [&](int q, int64_t d0, int n) {
    const float *even = rows + 2 * q * pitch + d0, *odd = even + pitch;
    Pair* to = both[q % 8];
    if (2 * q + 1 < lanes) {
      for (int d = 0; d < n; ++d) to[d].bits = to_bits(even[d]) >> 16 | (to_bits(odd[d]) & 0xffff0000u);
    } else {
      for (int d = 0; d < n; ++d) to[d].bits = 2 * q < lanes ? to_bits(even[d]) >> 16 : 0;
    }
    return to;
  });
  memset(out + D * (P / 2), 0, size_t((depth - D) * (P / 2)) * sizeof(Pair));
}

SADCL_KERNELS_END
