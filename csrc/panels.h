// Matrix products on panels.
//
// A matrix X [R, K] is kept as ceil(R / P) panels of P rows, each stored k-major: panel[k][lane], lane = row % P, lanes
// past R zero. P = 3 registers wide, and the register tile is kMR x P. kMR divides P, so one copy of X serves as either
// operand of a product (broadcast from the left, vectors from the right): no second packing.
//
//   AVX2, float:    4 x 24: 12 accumulators + 3 vectors + 1 broadcast = 16 registers; 7 loads per 12 FMA
//   AVX-512, float: 8 x 48: 24 accumulators + 3 vectors, broadcasts ride in the FMA:  11 loads per 24 FMA
//
// The inner loops want the right operand's panel in L1 (kPanelDepth) and the rest streaming from L2. dot_panels also
// takes panels of Pair, half as deep: bfloat16 where the processor multiplies it.
#pragma once
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
struct Tile {
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kVecs = 3;
  static constexpr int P = kVecs * kLanes;
  static constexpr int kMR = kRegisters == 32 ? (kLanes >= 8 ? 8 : 6) : (P % 4 == 0 ? 4 : 2);
  // Two panels of this depth (one per operand) take 24 KB: they share the smallest L1 in use, 32 KB, with the result.
  // And at most 128, for precision: see dot_panels.
  static constexpr int kFit = 24 * 1024 / (2 * P * int(sizeof(T)));
  static constexpr int kPanelDepth = (kFit < 128 ? kFit : 128) / kMR * kMR;
  static_assert(P % kMR == 0, "a register tile must not straddle panels");
};

template <class T>
struct Accumulators {
  vec<T> v[Tile<T>::kMR][Tile<T>::kVecs];
};

template <class T>
SADCL_INLINE void clear(Accumulators<T>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < Tile<T>::kMR; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < Tile<T>::kVecs; ++i) acc.v[r][i] = vec<T>{};
}

// c: kMR rows of P, contiguous.
template <class T>
SADCL_INLINE void store_tile(const Accumulators<T>& acc, T* c) {
#pragma GCC unroll 8
  for (int r = 0; r < Tile<T>::kMR; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < Tile<T>::kVecs; ++i) store(c + r * Tile<T>::P + i * Tile<T>::kLanes, acc.v[r][i]);
}

template <class T>
SADCL_INLINE void add_to_tile(const Accumulators<T>& acc, T* c) {
#pragma GCC unroll 8
  for (int r = 0; r < Tile<T>::kMR; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < Tile<T>::kVecs; ++i) {
      T* to = c + r * Tile<T>::P + i * Tile<T>::kLanes;
      store(to, load(to) + acc.v[r][i]);
    }
}

// acc[r][:] += sum over k < depth of a[r * A_ROW + k * A_K] * b[k][:], depth a multiple of kMR (or a panel's lanes).
// For every line of `a` that is used up, one of `next` is asked for. Of the right panel's lanes, the first VECS
// registers.
template <int A_ROW, int A_K, int VECS = 3, class E, class T>
SADCL_INLINE void multiply_add(Accumulators<T>& acc, const E* a, const E* b, int depth, const E* next = nullptr) {
  constexpr int kMR = Tile<T>::kMR, kLine = 64 / (kMR * int(sizeof(E))), kMost = kLine < kMR ? kLine : kMR,
                kStep = Tile<T>::P / kTerms<E> % kMost == 0 ? kMost : kMost / 2;
  static_assert(kMR % kStep == 0 && Tile<T>::P / kTerms<E> % kStep == 0, "no step may be cut short");
  for (int k = 0; k < depth; k += kStep) {
    if (next != nullptr) __builtin_prefetch(next + k * kMR);
#pragma GCC unroll 8
    for (int step = 0; step < kStep; ++step, a += A_K, b += Tile<T>::P) {
      decltype(load(b)) right[VECS];
#pragma GCC unroll 3
      for (int i = 0; i < VECS; ++i) right[i] = load(b + i * Tile<T>::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kMR; ++r) {
        const auto left = splat(a[r * A_ROW]);
#pragma GCC unroll 3
        for (int i = 0; i < VECS; ++i) acc.v[r][i] = add_product<T>(acc.v[r][i], left, right[i]);
      }
    }
  }
}

// out[jp][i][lane] = sum over k of x_i[k] y_j[k], j = jp * P + lane: all pairs of rows of x_panels and y_panels panels
// of depth `depth` (a multiple of kMR). Depth is cut so that the running pair of panels stays in L1. Each cut is summed
// from zero and then added to `out`: one chain through all of depth 1024 was off by 6e-7 where MKL's product is by
// 2e-7. Only the first `x_rows` rows of x have to be right.
template <class E, class T>
void dot_panels(const E* x, int x_panels, const E* y, int y_panels, int64_t depth, T* out, int64_t x_rows) {
  constexpr int P = Tile<T>::P, kCut = Tile<T>::kPanelDepth / kTerms<E> / Tile<T>::kMR * Tile<T>::kMR;
  for (int64_t k0 = 0; k0 < depth; k0 += kCut) {
    const int cut = int(depth - k0 < kCut ? depth - k0 : kCut);
    for (int jp = 0; jp < y_panels; ++jp) {
      const E* b = y + (jp * depth + k0) * P;
      for (int ip = 0; ip < x_panels; ++ip) {
        const E* a = x + (ip * depth + k0) * P;
        // Streams from L2, and would come too late by itself.
        const E* next = ip + 1 < x_panels ? a + depth * P : jp + 1 < y_panels ? b + depth * P : x + (k0 + cut) * P;
        T* c = out + (int64_t(jp) * x_panels + ip) * P * P;
        for (int r = 0; r < P && ip * P + r < x_rows; r += Tile<T>::kMR) {
          Accumulators<T> acc;
          clear(acc);
          multiply_add<1, P>(acc, a + r, b, cut, next + r * cut);
          k0 == 0 ? store_tile(acc, c + r * P) : add_to_tile(acc, c + r * P);
        }
      }
    }
  }
}

template <class E, class T>
void dot_panels(const E* x, int x_panels, const E* y, int y_panels, int64_t depth, T* out) {
  dot_panels(x, x_panels, y, y_panels, depth, out, int64_t(x_panels) * Tile<T>::P);
}

// out[ip][d][lane] += sum over j of w[ip][j][lane] * y_j[d]: mixes the rows of y (y_panels panels of depth `depth`)
// into out's x_panels panels, weights given as panels themselves. The depth goes in slices so that y's slice stays in
// L2 while every panel of w passes through L1. At most kStage rows are summed before they are added to `out`: weights
// of both signs cancel here, and one long chain of float32 sums was 3 times less exact than torch's.
template <class T>
void mix_panels(const T* w, int x_panels, const T* y, int y_panels, int64_t depth, T* out) {
  constexpr int P = Tile<T>::P, kSlice = 128 / Tile<T>::kMR * Tile<T>::kMR, kStage = 96 / P > 0 ? 96 / P : 1;
  for (int64_t d0 = 0; d0 < depth; d0 += kSlice) {
    const int64_t d1 = d0 + kSlice < depth ? d0 + kSlice : depth;
    for (int ip = 0; ip < x_panels; ++ip) {
      for (int64_t d = d0; d < d1; d += Tile<T>::kMR) {
        T* c = out + (ip * depth + d) * P;
        for (int j0 = 0; j0 < y_panels; j0 += kStage) {
          Accumulators<T> acc;
          clear(acc);
          for (int jp = j0; jp < y_panels && jp < j0 + kStage; ++jp)
            multiply_add<P, 1>(acc, y + (jp * depth + d) * P, w + (int64_t(ip) * y_panels + jp) * P * P, P);
          add_to_tile(acc, c);
        }
      }
    }
  }
}

// The same of one panel of weights, w[j][lane], in place of `out`: of the first VECS registers of lanes, and of the
// first `rows` rows of y.
template <int VECS, class T>
void mix_vectors(const T* w, const T* y, int64_t rows, int64_t depth, T* out) {
  constexpr int P = Tile<T>::P, kMR = Tile<T>::kMR, kStage = 96 / P > 0 ? 96 / P * P : P;
  for (int64_t d = 0; d < depth; d += kMR)
    for (int64_t j0 = 0; j0 < rows; j0 += kStage) {
      Accumulators<T> acc;
      clear(acc);
      for (int64_t j = j0; j < rows && j < j0 + kStage; j += P) {
        const int count = int(rows - j < P ? (rows - j + kMR - 1) / kMR * kMR : P);
        multiply_add<P, 1, VECS>(acc, y + j * depth + d * P, w + j * P, count);
      }
      j0 == 0 ? store_tile(acc, out + d * P) : add_to_tile(acc, out + d * P);
    }
}

// ... of the first `lanes` lanes.
template <class T>
void mix_panel(const T* w, int64_t lanes, const T* y, int64_t rows, int64_t depth, T* out) {
  if (lanes > 2 * Tile<T>::kLanes) mix_vectors<3>(w, y, rows, depth, out);
  else if (lanes > Tile<T>::kLanes) mix_vectors<2>(w, y, rows, depth, out);
  else mix_vectors<1>(w, y, rows, depth, out);
}

// out[b][a][i][j] = in[a][b][j][i] for P x P blocks: turns w[jp][i][lane] into w'[ip][j][lane].
template <class T>
void transpose_blocks(const T* in, int outer, int inner, T* out) {
  constexpr int P = Tile<T>::P;
  for (int a = 0; a < outer; ++a)
    for (int b = 0; b < inner; ++b) {
      const T* block = in + (int64_t(a) * inner + b) * P * P;
      T* target = out + (int64_t(b) * outer + a) * P * P;
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < P; ++j) target[i * P + j] = block[j * P + i];
    }
}

SADCL_KERNELS_END
