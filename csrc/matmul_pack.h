// How operands of matmul.h's products become panels: k-major, a panel's lanes side by side, in the accumulation type or
// as pairs of bfloat16.
#pragma once
#include "convert.h"
#include "scratch.h"
#include "simd.h"

SADCL_KERNELS_BEGIN

// Offset of the i-th row (or column): i * near, or, for an index made of two, (i / split) * far + (i % split) * near.
struct Index {
  int64_t near = 0, split = 0, far = 0;
  int64_t operator()(int64_t i) const { return split == 0 ? i * near : i / split * far + i % split * near; }
  bool uniform(int64_t first, int64_t count) const {
    return split == 0 || first / split == (first + count - 1) / split;
  }
};

// Element (o, k) of batch (p, q): data[outer(o) + k(k) + p * batch[0] + q * batch[1]].
struct Source {
  Array array;  // data and dtype count
  Index outer, k;
  int64_t batch[2] = {0, 0};
  int64_t start(const int64_t (&at)[2]) const { return at[0] * batch[0] + at[1] * batch[1]; }
};

// What is packed: `values`, plus `plus` if it has data; 0 for every k with a nonzero drop[k + p * drop_batch].
struct Operand {
  Source values, plus;
  const uint8_t* drop = nullptr;
  int64_t drop_batch = 0;
};

template <class T>
struct MatmulTile {
  static constexpr int kLanes = Simd<T>::kLanes, kVecs = 2;
  static constexpr int kMR = kRegisters == 32 ? 12 : 6, kNR = kVecs * kLanes;
  // A right panel streams through L1: all of its 32 KB for 32 registers, since with 24 a cut is a chain and a half, and
  // every chain loads and stores its part of the result (one Zen 4 core, layers of 2048: 5 % of the time).
  static constexpr int kDepth = (kRegisters == 32 ? 32 : 24) * 1024 / (kNR * int(sizeof(T)));
  static constexpr int kRows = 288 * 1024 / (kDepth * int(sizeof(T))) / kMR * kMR;  // a left block stays in L2
  static constexpr int kColumns = 2048;                                             // a right block, in L3
  // Terms summed one after the other. At 384 the rounding error is 1.5 times MKL's; 192 left rows of label attention's
  // memory gradient at 1.3 of the error budget; 96 costs 3 % of the speed, 128 at most 1.
  static constexpr int kChain = 128;
};

// out[k * P + lane] = row[lane][k] for 8 lanes, k ascending. Where the panel has fewer, the surplus lands on lanes that
// are written later: those of the next k, of the lanes before (packed after), of the next panel, and at last on kSlack.
// By memcpy, since pairs of bfloat16 travel as floats here.
constexpr int kSlack = 16;
template <class T>
SADCL_INLINE void transpose_lanes(const T* const* row, int depth, int P, T* out) {
  for (int k = 0; k < depth; ++k)
    for (int l = 0; l < 8; ++l) memcpy(out + k * P + l, row[l] + k, sizeof(T));
}
#if defined(__AVX2__)
template <>
SADCL_INLINE void transpose_lanes<float>(const float* const* row, int depth, int P, float* out) {
  int k = 0;
  for (; k + 8 <= depth; k += 8) {
    __m256 x[8], y[8];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {  // halves of rows l and l + 4 side by side: no shuffle crosses the middle later
      const __m256 low = _mm256_loadu_ps(row[l] + k), high = _mm256_loadu_ps(row[l + 4] + k);
      x[l] = _mm256_permute2f128_ps(low, high, 0x20);
      x[l + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 8; h += 4) {
      y[0] = _mm256_unpacklo_ps(x[h], x[h + 1]), y[1] = _mm256_unpackhi_ps(x[h], x[h + 1]);
      y[2] = _mm256_unpacklo_ps(x[h + 2], x[h + 3]), y[3] = _mm256_unpackhi_ps(x[h + 2], x[h + 3]);
      float* o = out + int64_t(k + h) * P;
      _mm256_storeu_ps(o, _mm256_shuffle_ps(y[0], y[2], 0x44));
      _mm256_storeu_ps(o + P, _mm256_shuffle_ps(y[0], y[2], 0xee));
      _mm256_storeu_ps(o + 2 * P, _mm256_shuffle_ps(y[1], y[3], 0x44));
      _mm256_storeu_ps(o + 3 * P, _mm256_shuffle_ps(y[1], y[3], 0xee));
    }
  }
  for (; k < depth; ++k)
    for (int l = 0; l < 8; ++l) memcpy(out + int64_t(k) * P + l, row[l] + k, sizeof(float));
}
#endif

template <class T>
constexpr DType own_dtype() {
  return sizeof(T) == 8 ? kF64 : kF32;
}

// Eight lanes of a panel; those past the end of the matrix (`lanes` are left) become 0.
template <class T, int P>
void pack_lanes(const Source& s, int64_t offset, int64_t first, int lanes, int64_t k0, int depth, T* out) {
  constexpr int kMost = MatmulTile<T>::kDepth;
  T buffer[8][kMost];
  const T* row[8];
  static const T zeros[kMost] = {};
  const bool uniform = s.k.uniform(k0, depth);
  for (int l = 0; l < 8; ++l) {
    if (l >= lanes) {
      row[l] = zeros;
      continue;
    }
    const int64_t at = offset + s.outer(first + l);
    if (uniform && s.k.near == 1 && s.array.dtype == own_dtype<T>()) {
      row[l] = static_cast<const T*>(s.array.data) + at + s.k(k0);
      continue;
    }
    if (uniform) read_row(s.array, at + s.k(k0), s.k.near, depth, buffer[l]);
    else
      for (int k = 0; k < depth; ++k) read_row(s.array, at + s.k(k0 + k), 1, 1, buffer[l] + k);
    row[l] = buffer[l];
  }
  transpose_lanes<T>(row, depth, P, out);
}

// out[k][lane] = element (first + lane, k0 + k) of the source.
template <class T, int P>
void pack_source(const Source& s, int64_t offset, int64_t first, int lanes, int64_t k0, int depth, T* out) {
  if (s.outer.near == 1 && s.outer.uniform(first, lanes)) {
    const int64_t at = offset + s.outer(first);
    const bool plain = s.array.dtype == own_dtype<T>() && lanes == P;
    for (int k = 0; k < depth; ++k, out += P) {
      if (plain) {
        memcpy(out, static_cast<const T*>(s.array.data) + at + s.k(k0 + k), P * sizeof(T));
      } else {
        read_row(s.array, at + s.k(k0 + k), 1, lanes, out);
        for (int l = lanes; l < P; ++l) out[l] = 0;
      }
    }
    return;
  }
  for (int l = (P - 1) / 8 * 8; l >= 0; l -= 8)
    pack_lanes<T, P>(s, offset, first + l, lanes - l < 8 ? (lanes > l ? lanes - l : 0) : 8, k0, depth, out + l);
}

template <class T, int P>
void pack(const Operand& x, const int64_t (&batch)[2], int64_t first, int lanes, int64_t k0, int depth, T* out) {
  pack_source<T, P>(x.values, x.values.start(batch), first, lanes, k0, depth, out);
  if (x.plus.array.data != nullptr) {
    alignas(64) T more[P * MatmulTile<T>::kDepth + kSlack];
    pack_source<T, P>(x.plus, x.plus.start(batch), first, lanes, k0, depth, more);
    for (int i = 0; i < depth * P; ++i) out[i] += more[i];
  }
  if (x.drop == nullptr) return;
  for (int k = 0; k < depth; ++k)  // after the sum: what is dropped may be NaN
    if (x.drop[batch[0] * x.drop_batch + k0 + k])
      for (int l = 0; l < P; ++l) out[k * P + l] = 0;
}

// --- bfloat16 pairs ---

inline void narrow_row(const float* x, int n, BFloat16* out) {
  int i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
  for (; i < n; ++i) narrow(x[i], out + i);
}

// A stretch of an operand as bfloat16, along its depth or across: where it lies, or rounded (after the sum) in `buffer`.
struct Stretch {
  const Operand& x;
  const int64_t (&batch)[2];
  int64_t first;
  int n;
  bool along_k;

  const BFloat16* at(int64_t i, BFloat16* buffer) const {
    constexpr int kMost = 2 * MatmulTile<float>::kDepth;
    const Source& s = x.values;
    const Index &along = along_k ? s.k : s.outer, &across = along_k ? s.outer : s.k;
    const bool more = x.plus.array.data != nullptr;
    if (!more && along.near == 1 && along.uniform(first, n)) {
      const int64_t start = s.start(batch) + across(i) + along(first);
      if (s.array.dtype == kBF16) return static_cast<const BFloat16*>(s.array.data) + start;
      if (s.array.dtype == kF32) {
        narrow_row(static_cast<const float*>(s.array.data) + start, n, buffer);
        return buffer;
      }
    }
    float wide[kMost], added[kMost];
    read(s, i, wide);
    if (more) {
      read(x.plus, i, added);
      for (int k = 0; k < n; ++k) wide[k] += added[k];
    }
    narrow_row(wide, n, buffer);
    return buffer;
  }

 private:
  void read(const Source& s, int64_t i, float* out) const {
    const Index &along = along_k ? s.k : s.outer, &across = along_k ? s.outer : s.k;
    const int64_t start = s.start(batch) + across(i);
    if (along.uniform(first, n)) return read_row(s.array, start + along(first), along.near, n, out);
    for (int k = 0; k < n; ++k) read_row(s.array, start + along(first + k), 1, 1, out + k);
  }
};

SADCL_INLINE void pair_up(const BFloat16* even, const BFloat16* odd, int lanes, Pair* out) {
  for (int l = 0; l < lanes; ++l) out[l].bits = even[l].bits | uint32_t(odd[l].bits) << 16;
}

// out[k / 2][lane] = elements (first + lane, k0 + k and k0 + k + 1), rounded; `depth` counts elements.
template <class T, int P>
void pack(const Operand& x, const int64_t (&batch)[2], int64_t first, int lanes, int64_t k0, int depth, Pair* out) {
  constexpr int kMost = 2 * MatmulTile<float>::kDepth;
  static const BFloat16 zeros[kMost] = {};
  const int pairs = (depth + 1) / 2;
  if (x.values.outer.near == 1 && x.values.outer.uniform(first, lanes)) {
    BFloat16 even[(P + 15) / 16 * 16], odd[(P + 15) / 16 * 16];
    const Stretch across = {x, batch, first, lanes, false};
    for (int k = 0; k < depth; k += 2) {
      Pair* to = out + k / 2 * P;
      const BFloat16* one = across.at(k0 + k, even);
      const BFloat16* other = k + 1 < depth ? across.at(k0 + k + 1, odd) : zeros;
      if (lanes == P) {
        pair_up(one, other, P, to);
        continue;
      }
      pair_up(one, other, lanes, to);
      for (int l = lanes; l < P; ++l) to[l].bits = 0;
    }
  } else {
    BFloat16 buffer[8][kMost];
    const Stretch along = {x, batch, k0, depth, true};
    for (int l0 = (P - 1) / 8 * 8; l0 >= 0; l0 -= 8) {
      const float* row[8];
      for (int l = 0; l < 8; ++l) {
        const BFloat16* from = l0 + l < lanes ? along.at(first + l0 + l, buffer[l]) : zeros;
        if (depth % 2 != 0) {
          if (from != buffer[l]) memcpy(buffer[l], from, depth * sizeof(BFloat16));
          buffer[l][depth].bits = 0, from = buffer[l];
        }
        row[l] = reinterpret_cast<const float*>(from);
      }
      transpose_lanes<float>(row, pairs, P, reinterpret_cast<float*>(out + l0));
    }
  }
  if (x.drop == nullptr) return;
  for (int k = 0; k < depth; ++k)
    if (x.drop[batch[0] * x.drop_batch + k0 + k])
      for (int l = 0; l < P; ++l) out[k / 2 * P + l].bits &= k % 2 == 0 ? 0xffff0000u : 0xffffu;
}

SADCL_KERNELS_END
