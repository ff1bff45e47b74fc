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
#include "matmul_pack.h"

SADCL_KERNELS_BEGIN

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

// Memory that is needed next, `rows` rows of `width` bytes: a line of it is asked for every few steps of a tile.
// Packing waits for memory otherwise, which is a quarter of the time where a weight meets 80 rows only.
struct Ahead {
  const char* row;
  int64_t stride, rows, width, at = 0;
  SADCL_INLINE void next() {
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at >= width) at = 0, row += stride, stride = --rows > 1 ? stride : 0;
  }
};
struct Soon {
  Ahead one, other;
};

// c[r][:] (+)= sum over k of a[k][r] b[k][:] (+ part[r][:]), ROWS rows, VECS vectors wide, k over elements E: numbers
// or pairs.
template <int ROWS, int VECS, class T, class E>
SADCL_INLINE void multiply_chain(const E* a, const E* b, int depth, T* c, int64_t stride, bool load_c, Soon& soon,
                                 const T* part = nullptr) {
  constexpr int kMR = MatmulTile<T>::kMR, kNR = MatmulTile<T>::kNR, L = MatmulTile<T>::kLanes;
  vec<T> acc[ROWS][VECS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) acc[r][i] = vec<T>{};
  }
  auto step = [&]() __attribute__((always_inline)) {
    decltype(load(b)) right[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) right[i] = load(b + i * L);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const auto left = splat(a[r]);
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) acc[r][i] = add_product<T>(acc[r][i], left, right[i]);
    }
    a += kMR, b += kNR;
    // Of 16 registers 15 are in use: no load of the next step may come up here, or a sum is spilled.
    if (kRegisters == 16) asm volatile("" ::: "memory");
  };
  constexpr int kApart = kRegisters == 32 ? 2 : 4;  // steps from line to line, each 48 or 24 cycles
  // Rows of c lie pages apart: the last step would wait for memory. One at a time, since lines of a whole tile asked
  // for at once keep the panels' own waiting (2 % of the time).
  const T* row = c;
  int k = 0;
  for (int r = 1; k + 2 * kApart <= depth; k += 2 * kApart, ++r) {
    __builtin_prefetch(row, 1);
    if (VECS * kVecBytes > 64) __builtin_prefetch(row + L, 1);
    row += r < ROWS ? stride : 0;
    soon.one.next();
#pragma GCC unroll 4
    for (int u = 0; u < kApart; ++u) step();
    soon.other.next();
#pragma GCC unroll 4
    for (int u = 0; u < kApart; ++u) step();
  }
  for (; k < depth; ++k) step();
  if (part != nullptr) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) acc[r][i] += loadu(part + r * kNR + i * L);
  }
  if (load_c) {  // all of it before the first store: rows of c alias in their low address bits, and loads would wait
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) acc[r][i] += loadu(c + r * stride + i * L);
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) storeu(c + r * stride + i * L, acc[r][i]);
}

// Chain after chain; all but the last leave their sums in L1, since rows of c often share a set of it.
template <int ROWS, int VECS, class T, class E>
SADCL_INLINE void multiply_tile(const E* a, const E* b, int depth, T* c, int64_t stride, bool load_c, Soon& soon) {
  using B = MatmulTile<T>;
  alignas(64) T part[ROWS * B::kNR];
  int k = 0;
  for (; depth - k > B::kChain; k += B::kChain)
    multiply_chain<ROWS, VECS>(a + k * B::kMR, b + k * B::kNR, B::kChain, part, int64_t(B::kNR), k > 0, soon);
  multiply_chain<ROWS, VECS>(a + k * B::kMR, b + k * B::kNR, depth - k, c, stride, load_c, soon,
                             k > 0 ? part : nullptr);
}

// A thread's rectangle: rows in units of kMR, columns in units of kNR.
struct Rectangle {
  int64_t row[2], column[2], batch[2];
};

// E: what operands are packed as, T or Pair (rounded to bfloat16, summed in float32).
template <class T, class E = T>
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
  static constexpr int64_t kCut = Blk::kDepth * kTerms<E>;
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
                  E* buffer) {
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
    E *lefts = buffer, *rights = buffer + kLeft;
    // Rows that are one left block use a panel of the right operand once: all of them go through the same 32 KB.
    const int64_t first_row = mine.row[0] * kMR, panel = last_row - first_row <= Blk::kRows ? 0 : kNR;
    for (int64_t n0 = mine.column[0] * kNR; n0 < last_column; n0 += Blk::kColumns) {
      const int64_t n1 = n0 + Blk::kColumns < last_column ? n0 + Blk::kColumns : last_column;
      for (int64_t k0 = 0; k0 < s.k; k0 += kCut) {
        const int terms = int(s.k - k0 < kCut ? s.k - k0 : kCut), depth = (terms + kTerms<E> - 1) / kTerms<E>;
        const bool load_c = k0 > 0 || load_first;
        for (int64_t m0 = first_row; m0 < last_row; m0 += Blk::kRows) {
          const int64_t m1 = m0 + Blk::kRows < last_row ? m0 + Blk::kRows : last_row;
          for (int64_t i = m0; i < m1; i += kMR)
            pack<T, kMR>(left, mine.batch, i, int(m1 - i < kMR ? m1 - i : kMR), k0, terms, lefts + (i - m0) * depth);
          E* here = rights;
          for (int64_t j = n0; j < n1; j += kNR, here += panel * depth) {
            const int columns = int(n1 - j < kNR ? n1 - j : kNR);
            if (m0 == first_row) pack<T, kNR>(right, mine.batch, j, columns, k0, terms, here);
            Soon soon = ahead(here + panel * depth, depth);
            if (j + kNR < n1 && m0 == first_row) from_source(right, mine.batch, j + kNR, k0, terms, panel == 0, soon);
            for (int64_t i = m0; i < m1; i += kMR)
              tile(lefts + (i - m0) * depth, here, depth, c.rows, base + j, i, int(m1 - i < kMR ? m1 - i : kMR),
                   columns, load_c, soon);
          }
        }
      }
    }
  }

  // The packed panel: both halves of it.
  static Soon ahead(const E* packed, int depth) {
    const int64_t half = int64_t(depth) * kNR * int64_t(sizeof(E)) / 2;
    const char* at = reinterpret_cast<const char*>(packed);
    return {{at, 0, 1, half}, {at + half, 0, 1, half}};
  }

  // What the next panel will be packed from; beside it the room for it (all of it, `soon` has halves), if that is not
  // in the cache already.
  static void from_source(const Operand& x, const int64_t (&batch)[2], int64_t first, int64_t k0, int terms, bool alone,
                          Soon& soon) {
    const Source& s = x.values;
    const int64_t size = element_size(s.array.dtype);
    const char* at = static_cast<const char*>(s.array.data) + size * (s.start(batch) + s.outer(first) + s.k(k0));
    Ahead all;
    if (s.outer.near == 1) all = {at, s.k.near * size, terms, kNR * size};
    else if (s.k.near == 1) all = {at, s.outer.near * size, kNR, terms * size};
    else return;
    if (alone) {
      const int64_t upper = all.rows / 2;
      soon = {all, all};
      soon.other.row += upper * all.stride, soon.other.rows -= upper, soon.one.rows = upper;
    } else {
      soon.other = {soon.one.row, 0, 1, 2 * soon.one.width}, soon.one = all;
    }
  }

  // One tile of the result, directly where it is whole and its rows evenly spaced, else by way of a small copy; the
  // last of 80 rows are no whole panel, and only as many thirds of one are multiplied as there are.
  static SADCL_INLINE void tile(const E* a, const E* b, int depth, const Index& rows, T* c, int64_t i, int m, int n,
                                bool load_c, Soon& soon) {
    constexpr int kThird = kMR / 3;
    if (m <= kThird) tile_of<kThird>(a, b, depth, rows, c, i, m, n, load_c, soon);
    else if (m <= 2 * kThird) tile_of<2 * kThird>(a, b, depth, rows, c, i, m, n, load_c, soon);
    else tile_of<kMR>(a, b, depth, rows, c, i, m, n, load_c, soon);
  }

  template <int ROWS>
  static SADCL_INLINE void tile_of(const E* a, const E* b, int depth, const Index& rows, T* c, int64_t i, int m, int n,
                                   bool load_c, Soon& soon) {
    if (m == ROWS && n == kNR && rows.uniform(i, ROWS))
      return multiply_tile<ROWS, Blk::kVecs>(a, b, depth, c + rows(i), rows.near, load_c, soon);
    alignas(64) T copy[ROWS * kNR];
    if (load_c)
      for (int r = 0; r < m; ++r)
        for (int j = 0; j < n; ++j) copy[r * kNR + j] = c[rows(i + r) + j];
    if (n <= Blk::kLanes) multiply_tile<ROWS, 1>(a, b, depth, copy, kNR, load_c, soon);
    else multiply_tile<ROWS, Blk::kVecs>(a, b, depth, copy, kNR, load_c, soon);
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
  Scratch<E> buffer_;
};

SADCL_KERNELS_END
