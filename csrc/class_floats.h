// class_rows.h's work on rows of float32 and narrower numbers, in float32 lanes: half the instructions of float64's.
//
// What keeps it as good: sums of few terms go on in float64, a gradient row is one difference of fused products, and
// what float32 has no room for (1e30, subnormal numbers, zero vectors) is left to class_rows.h, row by row.
#pragma once
#include "class_rows.h"

SADCL_KERNELS_BEGIN

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

typedef vec<float> Floats;
typedef uint16_t Halves __attribute__((vector_size(kVecBytes / 2)));
typedef uint16_t HalvesAt __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
constexpr int kFloats = Simd<float>::kLanes;

SADCL_INLINE void put(float* out, Floats x) { storeu(out, x); }
SADCL_INLINE void put(BFloat16* out, Floats x) {  // the bits of narrow()
  const Simd<float>::I bits = bits_of<float>(x);
  const Simd<float>::I rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  const Simd<float>::I chosen = x == x ? rounded : Simd<float>::I{} + 0x7fc0;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16((__m512i)chosen));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)chosen;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  *reinterpret_cast<HalvesAt*>(out) = __builtin_convertvector(chosen, Halves);
#endif
}
SADCL_INLINE void put(Float16* out, Floats x) {
  float y[kFloats];
  storeu(y, x);
  for (int64_t d = narrow_most(y, kFloats, out); d < kFloats; ++d) narrow(y[d], out + d);
}

// Squares of a row, and of what it is multiplied by, whose sum is between these are summed in float32 without loss.
SADCL_INLINE bool in_range(double square) { return square > 1e-24 && square < 1e30; }

// dot[r] = x_r . p, square[r] = x_r . x_r.
template <int R, class S>
SADCL_INLINE void dot_floats(const S* const* x, const float* p, int64_t n, double* dot, double* square) {
  constexpr int U = 2, kRun = 16;  // terms of a float32 sum; cosines and norms are off by up to 3e-8
  Wide d[R] = {}, s[R] = {};
  int64_t i = 0;
  const auto add = [](Wide& total, Floats x) {
    float y[kFloats];
    storeu(y, x);
    total += load_wide(y) + load_wide(y + kWide);
  };
  while (i + U * kFloats <= n) {
    Floats a[R][U] = {}, b[R][U] = {};
    for (const int64_t last = i + kRun * U * kFloats; i < last && i + U * kFloats <= n; i += U * kFloats)
      for (int u = 0; u < U; ++u) {
        const Floats q = loadu(p + i + u * kFloats);
        for (int r = 0; r < R; ++r) {
          const Floats v = widened(x[r] + i + u * kFloats);
          a[r][u] += v * q, b[r][u] += v * v;
        }
      }
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) add(d[r], a[r][u]), add(s[r], b[r][u]);
  }
  for (int r = 0; r < R; ++r) {
    double rest = 0, rest_square = 0;
    for (int64_t k = i; k < n; ++k) {
      const double v = widen(x[r][k]);
      rest += v * double(p[k]), rest_square += v * v;
    }
    dot[r] = sum<double>(d[r]) + rest, square[r] = sum<double>(s[r]) + rest_square;
  }
}

// Factors of a row's gradient for float32: along (p - (high + low) x).
struct RowFactors {
  float along, high, low;
  bool fits;
  RowFactors() {}
  RowFactors(double a, double k) {
    const double ratio = k == 0 ? 0 : -k / a, size = a < 0 ? -a : a, turn = ratio < 0 ? -ratio : ratio;
    along = float(a), high = float(ratio), low = float(ratio - double(high));
    fits = (size == 0 && k == 0) || (size > 1e-30 && size < 1e30 && (turn == 0 || (turn > 1e-30 && turn < 1e30)));
  }
};

template <int R, bool kAcross, class S>
SADCL_INLINE void combine_floats(const S* const* x, const float* p, int64_t n, const RowFactors* factors, S* const* out,
                                 float* part) {
  RowFactors f[R];
  for (int r = 0; r < R; ++r) f[r] = factors[r];
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    const Floats q = loadu(p + i);
    Floats t = loadu(part + i);
    for (int r = 0; r < R; ++r) {
      const Floats v = widened(x[r] + i);
      if (out != nullptr) put(out[r] + i, f[r].along * (kAcross ? q - f[r].high * v - f[r].low * v : q));
      t += f[r].along * v;
    }
    storeu(part + i, t);
  }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r) {
      const double v = widen(x[r][i]), turned = kAcross ? (double(f[r].high) + double(f[r].low)) * v : 0;
      if (out != nullptr) narrow(float(double(f[r].along) * (double(p[i]) - turned)), out[r] + i);
      part[i] += f[r].along * float(v);
    }
}

template <bool kAcross, class S>
SADCL_INLINE void combine_some(int rows, const S* const* x, const float* p, int64_t n, const RowFactors* factors,
                               S* const* out, float* part) {
  switch (rows) {
    case 4: return combine_floats<4, kAcross>(x, p, n, factors, out, part);
    case 3: return combine_floats<3, kAcross>(x, p, n, factors, out, part);
    case 2: return combine_floats<2, kAcross>(x, p, n, factors, out, part);
    case 1: return combine_floats<1, kAcross>(x, p, n, factors, out, part);
    default: return;
  }
}

// class_gradients() of rows whose numbers lie side by side as S, or are gathered as float.
template <class S, bool kGathered>
void class_gradients_as(const RowGradients& g, int64_t c, int64_t d, int64_t n) {
  constexpr int kRows = 4, kRun = 16;  // images of a float32 sum
  const Array &x = *g.features, &p = *g.vectors;
  const int64_t B = x.shape[0], C = x.shape[1], D = x.shape[2];
  float vector[kRowBlock], part[kRowBlock] = {};
  double total[kRowBlock];
  const float* q = block_of<float>(p, c * p.stride[0] + d * p.stride[1], n, vector);
  for (int64_t i = 0; i < n; ++i) total[i] = g.own ? g.own[c] * double(q[i]) : 0;
  const bool direct = !kGathered || x.dtype == kF32;
  const bool room = g.norms == nullptr || in_range(g.norms[c] * g.norms[c]);
  const S* from[kRows];
  S* to[kRows];
  int64_t at[kRows];
  float in[kGathered ? kRows : 1][kRowBlock], made[kGathered ? kRows : 1][kRowBlock];
  RowFactors factors[kRows];
  int rows = 0, summed = 0;
  const auto combine = [&] {
    S* const* out = g.grad_features ? to : nullptr;
    g.across ? combine_some<true>(rows, from, q, n, factors, out, part)
             : combine_some<false>(rows, from, q, n, factors, out, part);
    if constexpr (kGathered)
      if (g.grad_features && !direct)
        for (int r = 0; r < rows; ++r) write_row(g.grad_features, x.dtype, at[r], n, made[r]);
    summed += rows, rows = 0;
    if (summed < kRun) return;
    for (int64_t i = 0; i < n; ++i) total[i] += double(part[i]), part[i] = 0;
    summed = 0;
  };
  for (int64_t b = 0; b < B; ++b) {
    const double along = g.along[b * C + c], across = g.across ? g.across[b * C + c] : 0;
    const int64_t offset = b * x.stride[0] + c * x.stride[1] + d * x.stride[2], place = (b * C + c) * D + d;
    if (g.skip && along == 0 && across == 0) {
      const int64_t size = element_size(x.dtype);
      if (g.grad_features) memset(static_cast<char*>(g.grad_features) + place * size, 0, size_t(n * size));
      continue;
    }
    factors[rows] = RowFactors(along, across);
    if (room && factors[rows].fits) {
      if constexpr (kGathered) read_row(x, offset, x.stride[2], n, in[rows]), from[rows] = in[rows];
      else from[rows] = static_cast<const S*>(x.data) + offset;
      at[rows] = place;
      if constexpr (kGathered) to[rows] = made[rows];
      if (direct) to[rows] = static_cast<S*>(g.grad_features) + place;
      if (++rows == kRows) combine();
      continue;
    }
    float alone[2][kRowBlock];
    float* const wide[1] = {alone[1]};
    read_row(x, offset, x.stride[2], n, alone[0]);
    const float* const one[1] = {alone[0]};
    combine_rows<1>(one, q, n, &along, &across, wide, total);
    if (g.grad_features) write_row(g.grad_features, x.dtype, place, n, alone[1]);
  }
  combine();
  if (g.grad_vectors == nullptr) return;
  for (int64_t i = 0; i < n; ++i) vector[i] = float(total[i] + double(part[i]));
  write_row(g.grad_vectors, p.dtype, c * D + d, n, vector);
}

template <class T>
void class_gradients_of(const RowGradients& g, int64_t c, int64_t d, int64_t n) {
  if constexpr (kFused && sizeof(T) == 4) {
    if (g.features->stride[2] != 1 && n != 1) return class_gradients_as<float, true>(g, c, d, n);
    switch (g.features->dtype) {
      case kBF16: return class_gradients_as<BFloat16, false>(g, c, d, n);
      case kF16: return class_gradients_as<Float16, false>(g, c, d, n);
      default: return class_gradients_as<float, false>(g, c, d, n);
    }
  }
  class_gradients<T>(g, c, d, n);
}

template <class T>
void row_gradients(const RowGradients& g) {
  const int64_t C = g.features->shape[1], D = g.features->shape[2];
  if (g.grad_features != nullptr)
    want_huge_pages(g.grad_features, size_t(g.features->shape[0] * C * D * element_size(g.features->dtype)));
  const int64_t block = C < 2 * g.threads ? kRowBlock / 4 : kRowBlock, blocks = (D + block - 1) / block;
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t i = 0; i < C * blocks; ++i) {
    const int64_t c = i / blocks, d = i % blocks * block;
    class_gradients_of<T>(g, c, d, D - d < block ? D - d : block);
  }
}

SADCL_KERNELS_END
