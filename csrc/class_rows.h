// One vector per class against that class's row of every image: features x [B, C, D], vectors p [C, D].
//
// The products that PSCL and the group-wise classifier need, in float64 lanes whatever the input: this is bound by
// memory, so width costs nothing, and 1e30 or subnormal features need no second thought.
#pragma once
#include "convert.h"
#include "scratch.h"
#include "simd.h"

SADCL_KERNELS_BEGIN

typedef float HalfVec __attribute__((vector_size(kVecBytes / 2)));
typedef float HalfVecAt __attribute__((vector_size(kVecBytes / 2), aligned(4), may_alias));
typedef vec<double> Wide;
constexpr int kWide = Simd<double>::kLanes;

SADCL_INLINE Wide load_wide(const float* p) {
  return __builtin_convertvector(static_cast<HalfVec>(*reinterpret_cast<const HalfVecAt*>(p)), Wide);
}
SADCL_INLINE Wide load_wide(const double* p) { return loadu(p); }
SADCL_INLINE void store_narrow(float* p, Wide x) {
  *reinterpret_cast<HalfVecAt*>(p) = __builtin_convertvector(x, HalfVec);
}
SADCL_INLINE void store_narrow(double* p, Wide x) { storeu(p, x); }

constexpr int64_t kRowBlock = 1024;  // of a row at a time: 4 rows in and out, a vector and a float64 sum fit the cache

// A block of a row as contiguous T: in place where it is that already, else converted into `buffer`.
template <class T>
SADCL_INLINE const T* block_of(const Array& a, int64_t offset, int64_t n, T* buffer) {
  const int64_t stride = a.stride[a.dims - 1];
  const DType own = sizeof(T) == 8 ? kF64 : kF32;
  if (a.dtype == own && (stride == 1 || n == 1)) return static_cast<const T*>(a.data) + offset;
  read_row(a, offset, stride, n, buffer);
  return buffer;
}

// dot[r] += x_r . p, square[r] += x_r . x_r (if kSquare).
template <int R, bool kSquare, class T>
SADCL_INLINE void dot_rows(const T* const* x, const T* p, int64_t n, double* dot, double* square) {
  constexpr int U = 2;  // with two rows and squares: 8 chains cover the latency of an FMA
  Wide d[R][U] = {}, s[R][U] = {};
  int64_t i = 0;
  for (; i + U * kWide <= n; i += U * kWide) {
    for (int u = 0; u < U; ++u) {
      const Wide q = load_wide(p + i + u * kWide);
      for (int r = 0; r < R; ++r) {
        const Wide v = load_wide(x[r] + i + u * kWide);
        d[r][u] += v * q;
        if (kSquare) s[r][u] += v * v;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    double rest = 0, rest_square = 0;
    for (int64_t k = i; k < n; ++k) {
      rest += double(x[r][k]) * double(p[k]);
      if (kSquare) rest_square += double(x[r][k]) * double(x[r][k]);
    }
    dot[r] += sum<double>(d[r][0] + d[r][1]) + rest;
    if (kSquare) square[r] += sum<double>(s[r][0] + s[r][1]) + rest_square;
  }
}

// Products of R (1 or 2) images' rows of class c with its vector.
template <int R, bool kSquare, class T>
void products(const Array& features, const Array& vectors, int64_t b, int64_t c, double* dot, double* square) {
  T buffer[R + 1][kRowBlock];
  const int64_t D = features.shape[2];
  for (int r = 0; r < R; ++r) dot[r] = square[r] = 0;
  const bool direct =
      features.dtype <= kF64 && vectors.dtype <= kF64 && features.stride[2] == 1 && vectors.stride[1] == 1;
  const int64_t step = direct ? D : kRowBlock;
  for (int64_t d = 0; d < D; d += step) {
    const int64_t n = D - d < step ? D - d : step;
    const T* x[R];
    for (int r = 0; r < R; ++r)
      x[r] = block_of<T>(features, (b + r) * features.stride[0] + c * features.stride[1] + d * features.stride[2], n,
                         buffer[r]);
    const T* p = block_of<T>(vectors, c * vectors.stride[0] + d * vectors.stride[1], n, buffer[R]);
    dot_rows<R, kSquare>(x, p, n, dot, square);
  }
}

// What the gradient of a row and of a vector is made of:
//   grad x_bc = along[b, c] p_c + across[b, c] x_bc        grad p_c = own[c] p_c + sum_b along[b, c] x_bc
// Rows with along = across = 0 have gradient 0, whatever they hold, if `skip` says so.
struct RowGradients {
  const Array *features, *vectors;
  const double *along, *across, *own;  // [B, C], [B, C] or null, [C] or null
  const double* norms;                 // [C] of the vectors, or null where `across` is
  bool skip;
  void *grad_features, *grad_vectors;  // contiguous, of the inputs' dtypes; null: not wanted
  int threads;
};

template <int R, class T>
SADCL_INLINE void combine_rows(const T* const* x, const T* p, int64_t n, const double* along, const double* across,
                               T* const* out, double* total) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Wide q = load_wide(p + i);
    Wide t = loadu(total + i);
    for (int r = 0; r < R; ++r) {
      const Wide v = load_wide(x[r] + i);
      if (out != nullptr) store_narrow(out[r] + i, along[r] * q + across[r] * v);
      t += along[r] * v;
    }
    storeu(total + i, t);
  }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r) {
      const double v = x[r][i];
      if (out != nullptr) out[r][i] = T(along[r] * double(p[i]) + across[r] * v);
      total[i] += along[r] * v;
    }
}

// The gradients of one class, features [d, d + n) of each row. Images in ascending order, whatever the threads.
template <class T>
void class_gradients(const RowGradients& g, int64_t c, int64_t d, int64_t n) {
  constexpr int kRows = 4;
  const Array &x = *g.features, &p = *g.vectors;
  const int64_t B = x.shape[0], C = x.shape[1], D = x.shape[2];
  T in[kRows][kRowBlock], made[kRows][kRowBlock], vector[kRowBlock];
  double total[kRowBlock];
  const T* q = block_of<T>(p, c * p.stride[0] + d * p.stride[1], n, vector);
  for (int64_t i = 0; i < n; ++i) total[i] = g.own ? g.own[c] * double(q[i]) : 0;

  const bool direct = g.grad_features != nullptr && x.dtype == (sizeof(T) == 8 ? kF64 : kF32);
  for (int64_t b = 0; b < B;) {
    int rows = 0;
    int64_t at[kRows];
    const T* from[kRows];
    T* to[kRows];
    double along[kRows], across[kRows];
    for (; b < B && rows < kRows; ++b) {
      const double a = g.along[b * C + c], k = g.across ? g.across[b * C + c] : 0;
      const int64_t offset = (b * C + c) * D + d;
      if (g.skip && a == 0 && k == 0) {
        if (g.grad_features)
          memset(static_cast<char*>(g.grad_features) + offset * element_size(x.dtype), 0,
                 size_t(n * element_size(x.dtype)));
        continue;
      }
      from[rows] = block_of<T>(x, b * x.stride[0] + c * x.stride[1] + d * x.stride[2], n, in[rows]);
      to[rows] = direct ? static_cast<T*>(g.grad_features) + offset : made[rows];
      at[rows] = offset, along[rows] = a, across[rows] = k;
      ++rows;
    }
    T* const* out = g.grad_features ? to : nullptr;
    switch (rows) {
      case 4: combine_rows<4>(from, q, n, along, across, out, total); break;
      case 3: combine_rows<3>(from, q, n, along, across, out, total); break;
      case 2: combine_rows<2>(from, q, n, along, across, out, total); break;
      case 1: combine_rows<1>(from, q, n, along, across, out, total); break;
      default: break;
    }
    if (g.grad_features && !direct)
      for (int r = 0; r < rows; ++r) write_row(g.grad_features, x.dtype, at[r], n, made[r]);
  }
  if (g.grad_vectors == nullptr) return;
  for (int64_t i = 0; i < n; ++i) vector[i] = T(total[i]);
  write_row(g.grad_vectors, p.dtype, c * D + d, n, vector);
}

SADCL_KERNELS_END
