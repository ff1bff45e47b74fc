// SSCL's work on one block of scores, and the order in which the blocks are visited.
//
// A block is w[jp][i][lane]: scores of m rows i against the P lanes of each panel jp (panels.h's dot_panels).
#pragma once
#include "sscl_rows.h"

SADCL_KERNELS_BEGIN

constexpr double kLog2E = 1.4426950408889634074;

// Panels [first, last) form a block. 192 rows (kBlockRows): w and its transpose (2 x 147 KB) stay in L2, and a panel of
// weights (192 x P) in L1 while mix_panels runs over it.
template <class T>
struct Blocks {
  static constexpr int P = Tile<T>::P;
  static constexpr int kFit = 27 * 1024 / (P * int(sizeof(T)));
  static constexpr int kMaxPanels = (kFit < kBlockRows ? kFit : kBlockRows) / P;
  static_assert(kWidestPanel % P == 0, "sscl_keep counts in panels of kWidestPanel");
  int64_t panels, count;

  // At least two blocks a thread, so that a round of `for_all_pairs` has a task for everybody.
  Blocks(int64_t panels, int threads) : panels(panels) {
    const int64_t step = 2 * threads, needed = (panels + kMaxPanels - 1) / kMaxPanels;
    count = (needed + step - 1) / step * step;
    if (count > panels) count = panels;
  }
  Range panels_of(int64_t b) const { return {b * panels / count, (b + 1) * panels / count}; }
};

// Scores that the forward keeps for the backward: blocks (a, b), a <= b, as far as the op layer's buffer reaches. Its
// head names the division into blocks, because the backward may run with another number of threads.
template <class T>
class Kept {
 public:
  static constexpr int64_t kHead = 64 / sizeof(T);
  static_assert(kHead <= kKeptHead, "sscl_keep leaves room for the head");

  Kept(T* data, int64_t size, const Blocks<T>& blocks)
      : data_(data), size_(size), blocks_(blocks), start_(blocks.count + 1) {
    int64_t at = kHead;
    for (int64_t b = 0; b < blocks.count; ++b) {
      start_[b] = at;
      at += scores(b, blocks.panels_of(b).last);
    }
  }
  // Everything but the blocks themselves; what is left over is zero, so that all outputs are the same in every run.
  void begin() const {
    int64_t end = 0;
    if (size_ >= kHead) {
      memset(data_, 0, kHead * sizeof(T));
      data_[0] = T(blocks_.count);
      end = kHead;
    }
    for (int64_t b = 0; b < blocks_.count; ++b)
      for (int64_t a = 0; a <= b; ++a)
        if (const T* block = at(a, b)) end = block - data_ + count(a, b);
    if (end < size_) memset(data_ + end, 0, size_t(size_ - end) * sizeof(T));
  }
  bool valid() const { return size_ >= kHead && data_[0] == T(blocks_.count); }
  // Where the block lies, or null where it is not kept.
  T* at(int64_t a, int64_t b) const {
    const int64_t first = start_[b] + scores(b, blocks_.panels_of(a).first);
    return first + count(a, b) <= size_ ? data_ + first : nullptr;
  }
  int64_t count(int64_t a, int64_t b) const {
    const Range rows = blocks_.panels_of(a);
    return scores(b, rows.last - rows.first);
  }

 private:
  // Of `panels` panels of rows against block b.
  int64_t scores(int64_t b, int64_t panels) const {
    const Range columns = blocks_.panels_of(b);
    return panels * (columns.last - columns.first) * Tile<T>::P * Tile<T>::P;
  }

  T* data_;
  int64_t size_;
  const Blocks<T>& blocks_;
  Scratch<int64_t> start_;  // of block b's first partner
};

// Calls task(a, b) once for every pair of blocks a <= b, in rounds in which no two tasks share a block: a round-robin
// tournament. So a task may add to what belongs to its two blocks without locks or atomics, whichever thread runs it,
// and the order of additions (hence every bit) does not depend on timing.
template <class Task>
void for_all_pairs(int64_t blocks, [[maybe_unused]] int threads, Task task) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < blocks; ++b) task(b, b);
    const int64_t players = blocks + (blocks & 1), circle = players - 1;
    for (int64_t round = 0; round < circle; ++round) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < players / 2; ++k) {
        const int64_t a = k == 0 ? circle : (round + k) % circle, b = (round + circle - k) % circle;
        if (a < blocks) a < b ? task(a, b) : task(b, a);
      }
    }
  }
}

// One pair of blocks: rows [i0, i0 + m) against columns [j0, j0 + panels * P); rows and columns from n on are padding.
template <class T>
struct Block {
  static constexpr int P = Tile<T>::P, L = Tile<T>::kLanes;
  int64_t i0, j0, n;
  int m, panels;
  T* w;

  T* at(int jp, int i) const { return w + (int64_t(jp) * m + i) * P; }
  T& score(int64_t i, int64_t j) const { return at(int(j - j0) / P, int(i - i0))[(j - j0) % P]; }
  bool diagonal() const { return i0 == j0; }

  void set_diagonal(T value) const {
    const int64_t i1 = i0 + m, j1 = j0 + int64_t(panels) * P;
    for (int64_t i = i0 > j0 ? i0 : j0; i < i1 && i < j1; ++i) score(i, i) = value;
  }
  void set_padding(T value) const {
    for (int64_t i = i0; i < i0 + m; ++i)
      for (int64_t j = i < n ? (n > j0 ? n : j0) : j0; j < j0 + panels * P; ++j) score(i, j) = value;
  }
};

// Rows i in `rows`, columns j in `cols` (numbers of rows of the whole problem): all of one class.
struct Rect {
  Range rows, cols;
};

inline Range intersection(const Range& a, const Range& b) {
  return {a.first > b.first ? a.first : b.first, a.last < b.last ? a.last : b.last};
}

// Calls f(rect) for the parts of the block where row and column have the same class, unless that class is a single row.
template <class T, class F>
void for_same_class(const Rows<T>& rows, const Block<T>& block, F f) {
  const Range all = {0, block.n}, in_i = intersection(all, {block.i0, block.i0 + block.m}),
              in_j = intersection(all, {block.j0, block.j0 + int64_t(block.panels) * Block<T>::P});
  for (int64_t j = in_j.first; j < in_j.last;) {
    const Range same = rows.rows_of(rows.classes[j]);
    const Rect rect = {intersection(same, in_i), intersection(same, in_j)};
    if (rect.rows.first < rect.rows.last && same.last - same.first > 1) f(rect);
    j = rect.cols.last;
  }
}

// Sums f(score) over rows and over columns of the rectangle of panels [p0, p1) and rows [r0, r1), local numbers:
// row_sums[i - r0] and col_sums[(jp - p0) * P + lane]. Columns are added in two stages, as long float sums lose bits.
template <class T, class F>
void sums(const Block<T>& block, int p0, int p1, int r0, int r1, T* lanes, double* row_sums, double* col_sums, F f) {
  constexpr int P = Block<T>::P, L = Block<T>::L, kStage = 32;
  memset(lanes, 0, size_t(r1 - r0) * L * sizeof(T));
  for (int jp = p0; jp < p1; ++jp) {
    vec<T> total[3] = {};
    for (int stage = r0; stage < r1; stage += kStage) {
      vec<T> c0 = {}, c1 = {}, c2 = {};
      for (int i = stage; i < r1 && i < stage + kStage; ++i) {
        const T* s = block.at(jp, i);
        const vec<T> e0 = f(load(s), i, jp, 0), e1 = f(load(s + L), i, jp, 1), e2 = f(load(s + 2 * L), i, jp, 2);
        c0 += e0;
        c1 += e1;
        c2 += e2;
        T* row = lanes + int64_t(i - r0) * L;
        store(row, load(row) + ((e0 + e1) + e2));
      }
      total[0] += c0;
      total[1] += c1;
      total[2] += c2;
    }
    for (int l = 0; l < P; ++l) col_sums[(jp - p0) * P + l] = total[l / L][l % L];
  }
  for (int i = r0; i < r1; ++i) row_sums[i - r0] = sum<T>(load(lanes + int64_t(i - r0) * L));
}

// Lanes of panel jp that lie in `cols`: all ones there, else 0.
template <class T>
struct LaneMask {
  typename Simd<T>::I v[3];
  LaneMask(const Block<T>& block, int jp, const Range& cols) {
    const int64_t base = block.j0 + int64_t(jp) * Block<T>::P;
    for (int l = 0; l < Block<T>::P; ++l)
      v[l / Block<T>::L][l % Block<T>::L] = base + l >= cols.first && base + l < cols.last ? -1 : 0;
  }
};

SADCL_KERNELS_END
