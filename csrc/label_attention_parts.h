// Label attention's sizes and operands, and what happens between its matrix products.
#pragma once
#include "label_attention.h"
#include "matmul.h"
#include "vmath.h"

SADCL_KERNELS_BEGIN

// Elements of an array from `offset` on, by the given indices.
inline Source source(const Array& a, Index outer, Index k, int64_t offset = 0, int64_t batch0 = 0, int64_t batch1 = 0) {
  Source s;
  s.array = a;
  s.array.data = static_cast<char*>(a.data) + offset * element_size(a.dtype);
  s.outer = outer, s.k = k;
  s.batch[0] = batch0, s.batch[1] = batch1;
  return s;
}
template <class T>
Source source(const T* data, Index outer, Index k, int64_t batch0 = 0, int64_t batch1 = 0) {
  Array a;
  a.data = const_cast<T*>(data), a.dtype = own_dtype<T>();
  return source(a, outer, k, 0, batch0, batch1);
}

inline Operand operand(const Source& values) {
  Operand x;
  x.values = values;
  return x;
}

template <class T>
Result<T> result(T* data, Index rows, int64_t batch0 = 0, int64_t batch1 = 0) {
  Result<T> c;
  c.data = data, c.rows = rows;
  c.batch[0] = batch0, c.batch[1] = batch1;
  return c;
}

template <class T>
struct Problem {
  const LabelAttention& a;
  const int64_t B, L, E, H, C, Q, d;
  const T scale;

  explicit Problem(const LabelAttention& a)
      : a(a), B(a.memory.shape[0]), L(a.memory.shape[1]), E(a.memory.shape[2]), H(a.heads),
        C(a.query.shape[a.query.dims - 2]), Q(a.query.dims == 2 ? 1 : B), d(E / H),
        scale(T(1 / __builtin_sqrt(double(E / H)))) {}

  // A third of the input projection (0 query, 1 key, 2 value) as rows: W x, or as columns: W^T x; a head a batch or
  // whole.
  Source weight(int third, bool by_rows, bool by_head) const {
    const int64_t row = a.in_weight.stride[0], column = a.in_weight.stride[1];
    return source(a.in_weight, {by_rows ? row : column}, {by_rows ? column : row}, third * E * row,
                  by_head ? d * row : 0);
  }
  Source out_weight(bool by_rows) const {
    const int64_t row = a.out_weight.stride[0], column = a.out_weight.stride[1];
    return source(a.out_weight, {by_rows ? row : column}, {by_rows ? column : row});
  }
  // All queries, or all positions of all images, as the rows of one matrix.
  Index query_rows() const {
    const int64_t* s = a.query.stride;
    return a.query.dims == 2 ? Index{s[0]} : Index{s[1], C, s[0]};
  }
  Index query_columns() const { return {a.query.stride[a.query.dims - 1]}; }
  static Index rows_of(const Array& x) { return {x.stride[1], x.shape[1], x.stride[0]}; }

  // Memory, with its positions if it serves as keys; `flat`: images side by side instead of one a batch. Padded
  // positions are dropped where they are summed over.
  Operand positions(bool keys, bool sum_over, bool flat) const {
    Operand x = operand(one(a.memory, sum_over, flat));
    if (keys && a.memory_pos.data != nullptr) x.plus = one(a.memory_pos, sum_over, flat);
    if (sum_over) x.drop = a.padded, x.drop_batch = flat ? 0 : L;
    return x;
  }

 private:
  Source one(const Array& x, bool sum_over, bool flat) const {
    const Index rows = flat ? rows_of(x) : Index{x.stride[1]}, columns = {x.stride[2]};
    return source(x, sum_over ? columns : rows, sum_over ? rows : columns, 0, flat ? 0 : x.stride[0]);
  }
};

// A vector in T, of any dtype and stride; empty without data.
template <class T>
struct Vector {
  Scratch<T> values;
  bool there;
  Vector(const Array& x, int64_t n) : values(n), there(x.data != nullptr) {
    if (there) read_row(x, 0, x.stride[0], n, values.get());
  }
  const T* from(int64_t i) const { return there ? values.get() + i : nullptr; }
};

constexpr int kChunk = 64;  // columns of weights that one task takes: a whole number of vectors everywhere

template <class T>
SADCL_INLINE void copy_in(const T* x, int n, T* out) {
  if (n == kChunk) memcpy(out, x, kChunk * sizeof(T));
  else memcpy(out, x, n * sizeof(T));
}

// Calls work(b, first column, number of columns) for every chunk of every image.
template <class T, class Work>
void for_chunks(const Problem<T>& p, [[maybe_unused]] int threads, const Work& work) {
  const int64_t columns = p.H * p.C, chunks = (columns + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(p.B* p.L* columns < 1 << 14 ? 1 : threads) schedule(static)
  for (int64_t i = 0; i < p.B * chunks; ++i) {
    const int64_t j = i % chunks * kChunk;
    work(i / chunks, j, int(columns - j < kChunk ? columns - j : kChunk));
  }
}

// Scores in, weights out, in place: softmax over positions (into `soft` if there is dropout), then dropout. Their sum
// over positions goes to mass [heads, B, C].
template <class T>
void normalise(const Problem<T>& p, T* scores, T* soft, T* mass, int threads) {
  constexpr int V = Simd<T>::kLanes;
  const int64_t width = p.H * p.C;
  for_chunks(p, threads, [&](int64_t b, int64_t j0, int n) {
    alignas(64) T x[kChunk] = {}, peak[kChunk], total[kChunk] = {}, kept[kChunk] = {};
    T* first = scores + b * p.L * width + j0;
    const uint8_t* padded = p.a.padded == nullptr ? nullptr : p.a.padded + b * p.L;
    for (int j = 0; j < kChunk; ++j) peak[j] = -__builtin_inf();
    for (int64_t l = 0; l < p.L; ++l) {
      if (padded && padded[l]) continue;
      copy_in(first + l * width, n, x);
      for (int j = 0; j < kChunk; j += V) store(peak + j, vmax<T>(load(x + j), load(peak + j)));
    }
    for (int64_t l = 0; l < p.L; ++l) {
      T* row = first + l * width;
      if (padded && padded[l]) {
        memset(row, 0, n * sizeof(T));
        continue;
      }
      copy_in(row, n, x);
      for (int j = 0; j < kChunk; j += V) {
        const vec<T> e = exp<T>((load(x + j) - load(peak + j)) * p.scale);
        store(x + j, e);
        store(total + j, load(total + j) + e);
      }
      memcpy(row, x, n * sizeof(T));
    }
    for (int j = 0; j < kChunk; ++j) total[j] = T(1) / total[j];
    for (int64_t l = 0; l < p.L; ++l) {
      T* row = first + l * width;
      if (padded && padded[l]) {
        if (soft) memset(soft + (row - scores), 0, n * sizeof(T));
        continue;
      }
      for (int j = 0; j < n; ++j) row[j] *= total[j];
      if (soft) {
        const uint8_t* keep = p.a.survivors + (row - scores);
        memcpy(soft + (row - scores), row, n * sizeof(T));
        for (int j = 0; j < n; ++j) row[j] = keep[j] ? row[j] * T(p.a.keep_scale) : T(0);
      }
      for (int j = 0; j < n; ++j) kept[j] += row[j];
    }
    for (int j = 0; j < n; ++j) mass[((j0 + j) / p.C * p.B + b) * p.C + (j0 + j) % p.C] = kept[j];
  });
}

// Gradient of the applied weights in, gradient of the scores out, in place. What is added to a column's gradient (that
// of the weights' sum) comes in `added` [heads, B, C] or is null, `more` is the gradient of the weights as an output,
// or null.
template <class T>
void normalise_backward(const Problem<T>& p, T* grad, const T* added, const T* more, int threads) {
  const int64_t width = p.H * p.C;
  const T* soft = static_cast<const T*>(p.a.survivors == nullptr ? p.a.weights : p.a.soft);
  for_chunks(p, threads, [&](int64_t b, int64_t j0, int n) {
    T sum[kChunk] = {}, start[kChunk] = {};
    const int64_t at = b * p.L * width + j0;
    const uint8_t* padded = p.a.padded == nullptr ? nullptr : p.a.padded + b * p.L;
    for (int j = 0; added != nullptr && j < n; ++j) start[j] = added[((j0 + j) / p.C * p.B + b) * p.C + (j0 + j) % p.C];
    for (int64_t l = 0; l < p.L; ++l) {
      T* g = grad + at + l * width;
      if (padded && padded[l]) {
        memset(g, 0, n * sizeof(T));
        continue;
      }
      for (int j = 0; j < n; ++j) g[j] += start[j];
      if (more)
        for (int j = 0; j < n; ++j) g[j] += more[at + l * width + j];
      if (p.a.survivors)
        for (int j = 0; j < n; ++j) g[j] = p.a.survivors[at + l * width + j] ? g[j] * T(p.a.keep_scale) : T(0);
      for (int j = 0; j < n; ++j) sum[j] += g[j] * soft[at + l * width + j];
    }
    for (int64_t l = 0; l < p.L; ++l) {
      T* g = grad + at + l * width;
      if (padded && padded[l]) continue;
      for (int j = 0; j < n; ++j) g[j] = (g[j] - sum[j]) * soft[at + l * width + j] * p.scale;
    }
  });
}

// Where weights' gradients are made: in place or, for narrower weights, in a room that stays in the cache and is used
// again, so that no float32 copy of them all is ever in memory.
template <class T>
struct WeightGradients {
  const int64_t size;
  const int threads;
  Scratch<T> room;

  WeightGradients(int64_t size, bool narrower, int threads)
      : size(size), threads(threads), room(narrower ? size : 0) {}

  // make(T* of `size` numbers) for the matrix of number `index` in `out`.
  template <class Make>
  void operator()(void* out, DType dtype, int64_t index, const Make& make) {
    if (dtype == own_dtype<T>()) return make(static_cast<T*>(out) + index * size);
    make(room.get());
    constexpr int64_t kPart = 1 << 13;
#pragma omp parallel for num_threads(size < kPart * 4 ? 1 : threads) schedule(static)
    for (int64_t i = 0; i < size; i += kPart)
      write_row(out, dtype, index * size + i, size - i < kPart ? size - i : kPart, room.get() + i);
  }
};

// out[j] = sum over i of x[i][j], times factor[j / group][i] if there is one. Each column is summed by one thread.
template <class T>
void column_sums(const T* x, int64_t rows, int64_t columns, const T* factor, int64_t group, T* out,
                 [[maybe_unused]] int threads) {
#pragma omp parallel for num_threads(rows* columns < 1 << 15 ? 1 : threads) schedule(static)
  for (int64_t j0 = 0; j0 < columns; j0 += kChunk) {
    const int64_t j1 = j0 + kChunk < columns ? j0 + kChunk : columns;
    T sum[kChunk] = {};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = j0; j < j1; ++j)
        sum[j - j0] += x[i * columns + j] * (factor ? factor[j / group * rows + i] : T(1));
    memcpy(out + j0, sum, (j1 - j0) * sizeof(T));
  }
}

SADCL_KERNELS_END
