// Two-way loss: softplus(Tn lse_neg(x / Tn) + Tp lse_pos(-x / Tp)) of every row and of every column; compiled once per
// instruction set. Rows go through the cache in blocks, once forward and once backward; a block leaves two numbers a
// column and sign, which are merged in the blocks' order, so that bits do not depend on the threads.
#include "two_way.h"

#include "log_sums.h"
#include "scratch.h"

SADCL_KERNELS_BEGIN
namespace {

// Rows of a block: its two signs (2 x 256 KB of float32) stay in L2, unless the row is very long.
int64_t block_rows(int64_t C) {
  const int64_t rows = (1 << 16) / (C > 0 ? C : 1);
  return rows < 16 ? 16 : rows > 128 ? 128 : rows;
}

// A row as x / Tn of negatives and -x / Tp of positives, filled up to whole vectors with -inf.
template <class T>
bool scaled_row(const TwoWayInputs& in, int64_t b, int64_t pitch, T* negative, T* positive) {
  const int64_t C = in.logits.shape[1];
  const bool fine = part_row(in.logits, in.labels, b, 0, C, negative, positive);
  const T tn = T(in.negative_temperature), tp = T(in.positive_temperature);
  for (int64_t c = 0; c < C; ++c) negative[c] /= tn, positive[c] /= tp;
  for (int64_t c = C; c < pitch; ++c) negative[c] = positive[c] = T(-HUGE_VAL);
  return fine;
}

template <class T>
int64_t padded(int64_t C) {
  constexpr int L = Simd<T>::kLanes;
  return (C + L - 1) / L * L;
}

// What the softplus is of; -inf without a negative or without a positive.
double exponent(const TwoWayInputs& in, double no, double yes) {
  if (no == -HUGE_VAL || yes == -HUGE_VAL) return -HUGE_VAL;
  return in.negative_temperature * no + in.positive_temperature * yes;
}
double softplus(double u) { return u == -HUGE_VAL ? 0 : (u < 0 ? 0 : u) + log1p(::exp(-fabs(u))); }
double sigmoid(double u) { return 1 / (1 + ::exp(-u)); }

// Columns' largest value of a block and sum of e^(x - largest), `x` [rows][pitch].
template <class T>
void column_sums(const T* x, int64_t rows, int64_t pitch, T* peak, T* total) {
  constexpr int L = Simd<T>::kLanes;
  for (int64_t c = 0; c < pitch; c += L) {
    vec<T> best = splat(T(-HUGE_VAL)), sums = {};
    for (int64_t r = 0; r < rows; ++r) best = vmax<T>(loadu(x + r * pitch + c), best);
    const vec<T> pivot = best == T(-HUGE_VAL) ? vec<T>{} : best;
    for (int64_t r = 0; r < rows; ++r) sums += exp<T>(loadu(x + r * pitch + c) - pivot);
    storeu(peak + c, best), storeu(total + c, sums);
  }
}

template <class T>
bool forward(const TwoWayForward& a) {
  const int64_t B = a.in.logits.shape[0], C = a.in.logits.shape[1], pitch = padded<T>(C), R = block_rows(C);
  const int64_t blocks = (B + R - 1) / R;
  const int threads = B * C < 1 << 13 ? 1 : team_size(a.in.threads);
  Scratch<T> buffers(threads * 2 * R * pitch), parts(blocks * 4 * pitch);  // a block's: peak, total of each sign
  bool bad = false;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : bad)
  for (int64_t k = 0; k < blocks; ++k) {
    T* negative = buffers.get() + thread_index() * 2 * R * pitch;
    T* positive = negative + R * pitch;
    const int64_t first = k * R, rows = B - first < R ? B - first : R;
    for (int64_t r = 0; r < rows; ++r) {
      T *no = negative + r * pitch, *yes = positive + r * pitch;
      bad = !scaled_row(a.in, first + r, pitch, no, yes) || bad;
      LogSum<T> sums[2];
      sums[0].add(no, C), sums[1].add(yes, C);
      for (int sign = 0; sign < 2; ++sign) a.row_lse[sign * B + first + r] = sums[sign].value();
    }
    T* part = parts.get() + k * 4 * pitch;
    column_sums(negative, rows, pitch, part, part + pitch);
    column_sums(positive, rows, pitch, part + 2 * pitch, part + 3 * pitch);
  }
  for (int64_t b = 0; b < B; ++b)
    static_cast<T*>(a.row_loss)[b] = T(softplus(exponent(a.in, a.row_lse[b], a.row_lse[B + b])));
  for (int64_t c = 0; c < C; ++c) {
    for (int sign = 0; sign < 2; ++sign) {
      LogSum<T> merged;
      for (int64_t k = 0; k < blocks; ++k) {
        const T* part = parts.get() + (k * 4 + 2 * sign) * pitch + c;
        merged.add(part[0], double(part[pitch]));
      }
      a.class_lse[sign * C + c] = merged.value();
    }
    static_cast<T*>(a.class_loss)[c] = T(softplus(exponent(a.in, a.class_lse[c], a.class_lse[C + c])));
  }
  return !bad;
}

// The part of the gradient that one way gives; a factor of 0 takes everything, NaN included.
template <class T>
SADCL_INLINE vec<T> share(vec<T> x, vec<T> high, vec<T> factor) {
  return factor == T(0) ? vec<T>{} : exp<T>(x - high) * factor;
}

// Factors of one row or column with upstream gradient g: those of positives are negative.
template <class T>
void set_shifts(const TwoWayInputs& in, double g, double no, double yes, Shift<T>& negative, Shift<T>& positive) {
  const double slope = g * sigmoid(exponent(in, no, yes));
  negative = Shift<T>(no, slope), positive = Shift<T>(yes, -slope);
}

template <class T>
double element(const Array& a, int64_t i) {
  return a.dims == 0 ? 0.0 : double(static_cast<const T*>(a.data)[i * a.stride[0]]);
}

template <class T>
void backward(const TwoWayBackward& a) {
  constexpr int L = Simd<T>::kLanes;
  const Array& out = a.grad_logits;
  const int64_t B = out.shape[0], C = out.shape[1], pitch = padded<T>(C);
  if (B * C == 0) return;
  const int threads = B * C < 1 << 13 ? 1 : team_size(a.in.threads);
  Scratch<T> columns(4 * pitch), buffers(threads * 2 * pitch);  // columns: high, factor of each sign
  T* column = columns.get();
  memset(column, 0, size_t(4 * pitch) * sizeof(T));
  for (int64_t c = 0; c < C; ++c) {
    Shift<T> no, yes;
    set_shifts(a.in, element<T>(a.grad_classes, c), a.class_lse[c], a.class_lse[C + c], no, yes);
    column[c] = no.high, column[pitch + c] = no.factor;
    column[2 * pitch + c] = yes.high, column[3 * pitch + c] = yes.factor;
  }
  want_huge_pages(out.data, size_t(B * C * element_size(out.dtype)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < B; ++b) {
    T* negative = buffers.get() + thread_index() * 2 * pitch;
    T* positive = negative + pitch;
    scaled_row(a.in, b, pitch, negative, positive);
    Shift<T> no, yes;
    set_shifts(a.in, element<T>(a.grad_rows, b), a.row_lse[b], a.row_lse[B + b], no, yes);
    for (int64_t c = 0; c < pitch; c += L) {
      const vec<T> n = loadu(negative + c), p = loadu(positive + c);
      const auto is_positive = n == T(-HUGE_VAL);
      const vec<T> x = is_positive ? p : n;
      const vec<T> high = is_positive ? loadu(column + 2 * pitch + c) : loadu(column + c);
      const vec<T> factor = is_positive ? loadu(column + 3 * pitch + c) : loadu(column + pitch + c);
      const vec<T> row_high = is_positive ? splat(yes.high) : splat(no.high);
      const vec<T> row_factor = is_positive ? splat(yes.factor) : splat(no.factor);
      storeu(negative + c, share<T>(x, row_high, row_factor) + share<T>(x, high, factor));
    }
    write_row(out.data, out.dtype, b * C, C, negative);
  }
}

}  // namespace

bool two_way_forward(const TwoWayForward& args) {
  return SADCL_BY_DTYPE(two_way_forward, forward, args.in.logits.dtype, args);
}

void two_way_backward(const TwoWayBackward& args) {
  SADCL_BY_DTYPE(two_way_backward, backward, args.in.logits.dtype, args);
}

SADCL_KERNELS_END
