// General matrix products: c = left x right (+ c), batched, for operands of any strides and storage type.
//
// Operands are packed into k-major panels on the way in, so a transposed, strided, bfloat16, masked or summed operand
// costs nothing extra and needs no copy of its own. Each thread owns a rectangle of the result and packs for itself: no
// barrier, no sum split between threads, hence the same bits for every number of threads.
//
//   AVX2, float:    6 x 16: 12 accumulators + 2 vectors + 1 broadcast = 15 registers. One Zen 3 core, layers of
//                   2048, processor time on a shared machine: 72 to 88 % of the FMA peak, MKL interleaved 70 to 83 %
//   AVX-512, float: 12 x 32: 24 accumulators + 2 vectors, broadcasts ride in the FMA
//
// panels.h differs: there one packed copy serves as both operands, which symmetric scores want.
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
};

// What is packed: `values`, plus `plus` if it has data; 0 for every k with a nonzero drop[k + p * drop_batch].
struct Operand {
  Source values, plus;
  const uint8_t* drop = nullptr;
  int64_t drop_batch = 0;
};

// Element (i, j): data[rows(i) + j + p * batch[0] + q * batch[1]].
template <class T>
struct Result {
  T* data;
  Index rows;
  int64_t batch[2] = {0, 0};
  bool accumulate = false;
  const T* bias = nullptr;         // [n] (+ p * bias_batch): the sum starts here
  const T* bias_factor = nullptr;  // [m] (+ p * factor_batch): ... times this
  int64_t bias_batch = 0, factor_batch = 0;
};

struct Sizes {
  int64_t m, n, k;
  int64_t batch[2] = {1, 1};
};

template <class T>
struct MatmulTile {
  static constexpr int kLanes = Simd<T>::kLanes, kVecs = 2;
  static constexpr int kMR = kRegisters == 32 ? 12 : 6, kNR = kVecs * kLanes;
  static constexpr int kDepth = 24 * 1024 / (kNR * int(sizeof(T)));                 // a right panel takes 24 KB of L1
  static constexpr int kRows = 288 * 1024 / (kDepth * int(sizeof(T))) / kMR * kMR;  // a left block stays in L2
  static constexpr int kColumns = 2048;                                             // a right block, in L3
  // Terms summed one after the other. At 384 the rounding error is 1.5 times MKL's; 192 left rows of label attention's
  // memory gradient at 1.3 of the error budget; 96 costs 3 % of the speed, 128 at most 1.
  static constexpr int kChain = 128;
};

// c[r][:] (+)= sum over k of a[k][r] b[k][:], VECS vectors wide.
template <int VECS, class T>
SADCL_INLINE void multiply_chain(const T* a, const T* b, int depth, T* c, int64_t stride, bool load_c) {
  constexpr int kMR = MatmulTile<T>::kMR, kNR = MatmulTile<T>::kNR, L = MatmulTile<T>::kLanes;
  vec<T> acc[kMR][VECS];
#pragma GCC unroll 12
  for (int r = 0; r < kMR; ++r) {
    __builtin_prefetch(c + r * stride, 1);  // rows of c lie pages apart: without this the last step waits for memory
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) acc[r][i] = vec<T>{};
  }
#pragma GCC unroll 4
  for (int k = 0; k < depth; ++k, a += kMR, b += kNR) {
    vec<T> right[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) right[i] = load(b + i * L);
#pragma GCC unroll 12
    for (int r = 0; r < kMR; ++r) {
      const vec<T> left = splat(a[r]);
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) acc[r][i] += left * right[i];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMR; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) {
      T* out = c + r * stride + i * L;
      storeu(out, load_c ? acc[r][i] + loadu(out) : acc[r][i]);
    }
}

template <int VECS, class T>
SADCL_INLINE void multiply_tile(const T* a, const T* b, int depth, T* c, int64_t stride, bool load_c) {
  using B = MatmulTile<T>;
  for (int k = 0; k < depth; k += B::kChain, load_c = true)
    multiply_chain<VECS>(a + k * B::kMR, b + k * B::kNR, depth - k < B::kChain ? depth - k : B::kChain, c, stride,
                         load_c);
}

// out[k * P + lane] = row[lane][k] for 8 lanes, k ascending. Where the panel has fewer, the surplus lands on lanes that
// are written later: those of the next k, of the lanes before (packed after), of the next panel, and at last on kSlack.
constexpr int kSlack = 16;
template <class T>
SADCL_INLINE void transpose_lanes(const T* const* row, int depth, int P, T* out) {
  for (int k = 0; k < depth; ++k)
    for (int l = 0; l < 8; ++l) out[k * P + l] = row[l][k];
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
    for (int l = 0; l < 8; ++l) out[int64_t(k) * P + l] = row[l][k];
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
  auto offset = [&](const Source& s) { return batch[0] * s.batch[0] + batch[1] * s.batch[1]; };
  pack_source<T, P>(x.values, offset(x.values), first, lanes, k0, depth, out);
  if (x.plus.array.data != nullptr) {
    alignas(64) T more[P * MatmulTile<T>::kDepth + kSlack];
    pack_source<T, P>(x.plus, offset(x.plus), first, lanes, k0, depth, more);
    for (int i = 0; i < depth * P; ++i) out[i] += more[i];
  }
  if (x.drop == nullptr) return;
  for (int k = 0; k < depth; ++k)  // after the sum: what is dropped may be NaN
    if (x.drop[batch[0] * x.drop_batch + k0 + k])
      for (int l = 0; l < P; ++l) out[k * P + l] = 0;
}

// A thread's rectangle: rows in units of kMR, columns in units of kNR.
struct Rectangle {
  int64_t row[2], column[2], batch[2];
};

template <class T>
class Matmul {
  using Blk = MatmulTile<T>;
  static constexpr int kMR = Blk::kMR, kNR = Blk::kNR;

 public:
  // The packing buffers last as long as the object: fresh pages for every product would cost more than the packing.
  explicit Matmul(int threads) : threads_(team_size(threads)), buffer_(threads_ * kBuffer) {}
  int threads() const { return threads_; }

  void operator()(const Sizes& s, const Operand& left, const Operand& right, const Result<T>& c) {
    const int64_t rows = (s.m + kMR - 1) / kMR, columns = (s.n + kNR - 1) / kNR, batch = s.batch[0] * s.batch[1];
    if (rows * columns * batch == 0) return;
    int64_t grid[2] = {1, 1};
    const bool small = 2. * s.m * s.n * s.k * batch < kSerial;
    if (!small && (batch < 4 * threads_ && batch % threads_ != 0)) split(rows * kMR, columns * kNR, grid);
    const int64_t items = batch * grid[0] * grid[1];
#pragma omp parallel for num_threads(small ? 1 : threads_) schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t p = i / (grid[0] * grid[1]), r = i / grid[1] % grid[0], q = i % grid[1];
      const Rectangle mine = {{rows * r / grid[0], rows * (r + 1) / grid[0]},
                              {columns * q / grid[1], columns * (q + 1) / grid[1]},
                              {p / s.batch[1], p % s.batch[1]}};
      run(s, left, right, c, mine, buffer_.get() + thread_index() * kBuffer);
    }
  }

 private:
  static constexpr int64_t kLeft = int64_t(Blk::kRows) * Blk::kDepth + kSlack;
  static constexpr int64_t kRight = int64_t(Blk::kColumns) * Blk::kDepth + kSlack;
  static constexpr int64_t kBuffer = kLeft + kRight;
  static constexpr double kSerial = 4e5;  // below this many FLOP a second thread costs more than it brings

  // Threads by rows and by columns so that they pack the least: a thread packs rows / grid[0] + columns / grid[1].
  void split(int64_t rows, int64_t columns, int64_t (&grid)[2]) const {
    double best = 1e300;
    for (int64_t r = 1; r <= threads_; ++r) {
      if (threads_ % r != 0) continue;
      const double cost = double(rows) / r + double(columns) * r / threads_;
      if (cost < best) best = cost, grid[0] = r, grid[1] = threads_ / r;
    }
  }

  static void run(const Sizes& s, const Operand& left, const Operand& right, const Result<T>& c, const Rectangle& mine,
                  T* buffer) {
    T* base = c.data + mine.batch[0] * c.batch[0] + mine.batch[1] * c.batch[1];
    const bool load_first = c.accumulate || c.bias != nullptr;
    const int64_t last_row = mine.row[1] * kMR < s.m ? mine.row[1] * kMR : s.m;
    const int64_t last_column = mine.column[1] * kNR < s.n ? mine.column[1] * kNR : s.n;
    if (c.bias != nullptr) {
      start_with_bias(c, base, mine.batch[0], mine.row[0] * kMR, last_row, mine.column[0] * kNR, last_column);
    } else if (s.k == 0 && !c.accumulate) {  // a sum of nothing
      for (int64_t i = mine.row[0] * kMR; i < last_row; ++i)
        memset(base + c.rows(i) + mine.column[0] * kNR, 0, size_t(last_column - mine.column[0] * kNR) * sizeof(T));
    }
    T *lefts = buffer, *rights = buffer + kLeft;
    for (int64_t k0 = 0; k0 < s.k; k0 += Blk::kDepth) {
      const int depth = int(s.k - k0 < Blk::kDepth ? s.k - k0 : Blk::kDepth);
      const bool load_c = k0 > 0 || load_first;
      for (int64_t n0 = mine.column[0] * kNR; n0 < last_column; n0 += Blk::kColumns) {
        const int64_t n1 = n0 + Blk::kColumns < last_column ? n0 + Blk::kColumns : last_column;
        for (int64_t j = n0; j < n1; j += kNR)
          pack<T, kNR>(right, mine.batch, j, int(n1 - j < kNR ? n1 - j : kNR), k0, depth, rights + (j - n0) * depth);
        for (int64_t m0 = mine.row[0] * kMR; m0 < last_row; m0 += Blk::kRows) {
          const int64_t m1 = m0 + Blk::kRows < last_row ? m0 + Blk::kRows : last_row;
          for (int64_t i = m0; i < m1; i += kMR)
            pack<T, kMR>(left, mine.batch, i, int(m1 - i < kMR ? m1 - i : kMR), k0, depth, lefts + (i - m0) * depth);
          for (int64_t j = n0; j < n1; j += kNR)
            for (int64_t i = m0; i < m1; i += kMR)
              tile(lefts + (i - m0) * depth, rights + (j - n0) * depth, depth, c.rows, base + j, i,
                   int(m1 - i < kMR ? m1 - i : kMR), int(n1 - j < kNR ? n1 - j : kNR), load_c);
        }
      }
    }
  }

  // One tile of the result, directly where it is whole and its rows evenly spaced, else by way of a small copy.
  static SADCL_INLINE void tile(const T* a, const T* b, int depth, const Index& rows, T* c, int64_t i, int m, int n,
                                bool load_c) {
    if (m == kMR && n == kNR && rows.uniform(i, kMR))
      return multiply_tile<Blk::kVecs>(a, b, depth, c + rows(i), rows.near, load_c);
    alignas(64) T copy[kMR * kNR];
    if (load_c)
      for (int r = 0; r < m; ++r)
        for (int j = 0; j < n; ++j) copy[r * kNR + j] = c[rows(i + r) + j];
    if (n <= Blk::kLanes) multiply_tile<1>(a, b, depth, copy, kNR, load_c);
    else multiply_tile<Blk::kVecs>(a, b, depth, copy, kNR, load_c);
    for (int r = 0; r < m; ++r)
      for (int j = 0; j < n; ++j) c[rows(i + r) + j] = copy[r * kNR + j];
  }

  static void start_with_bias(const Result<T>& c, T* base, int64_t p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const T* bias = c.bias + p * c.bias_batch;
    for (int64_t i = i0; i < i1; ++i) {
      T* row = base + c.rows(i);
      const T factor = c.bias_factor == nullptr ? T(1) : c.bias_factor[p * c.factor_batch + i];
      for (int64_t j = j0; j < j1; ++j) row[j] = bias[j] * factor;
    }
  }

  int threads_;
  Scratch<T> buffer_;
};

SADCL_KERNELS_END
