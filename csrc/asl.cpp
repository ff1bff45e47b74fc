// Asymmetric loss: value and derivative in one sweep; compiled once per instruction set.
//
// A batch is cut into chunks of kChunk classes of one image. A chunk's inputs are contiguous T: read in place if they
// are already, converted into the cache otherwise. In a multi-label batch nearly all labels are 0, so groups of vectors
// with nothing but zeros take a path that knows only the negative half of the formula.
#include "asl.h"

#include "asl_formula.h"
#include "convert.h"
#include "scratch.h"

SADCL_KERNELS_BEGIN
namespace {

constexpr int64_t kChunk = 1024;  // 3 arrays of 4 KB: the first-level cache holds a chunk
constexpr int kGroup = 4;         // vectors looked at together

template <class T>
struct Totals {
  vec<T> loss = {};
  typename Simd<T>::I wrong = {};  // lanes with a label that is not allowed
};

// kGroup vectors. `loss` null: only the sum is wanted; `grad` null: no derivative.
template <class T, bool kClip>
SADCL_INLINE void group(const T* x, const T* y, const T* weight, T* loss, T* grad, const Focus<T>& f,
                        Totals<T>& totals) {
  constexpr int L = Simd<T>::kLanes;
  typename Simd<T>::I nonzero = {};
  for (int k = 0; k < kGroup; ++k) nonzero |= loadu(y + k * L) != T(0);
  const bool mixed = any<T>(nonzero);
  for (int k = 0; k < kGroup; ++k) {
    Element<T> e;
    if (mixed) {
      const vec<T> label = loadu(y + k * L);
      totals.wrong |= ~(((label >= T(0)) & (label <= T(1))) | (label == T(-1)));
      e = any_label<T, kClip>(loadu(x + k * L), label, f);
    } else {
      e = all_negative<T, kClip>(loadu(x + k * L), f);
    }
    if (weight != nullptr) e.loss *= loadu(weight + k * L), e.grad *= loadu(weight + k * L);
    if (loss != nullptr) storeu(loss + k * L, e.loss);
    if (grad != nullptr) storeu(grad + k * L, e.grad);
    totals.loss += e.loss;
  }
}

// One chunk of contiguous inputs; returns the sum of its losses.
template <class T, bool kClip>
double chunk(int64_t n, const T* x, const T* y, const T* weight, T* loss, T* grad, const Focus<T>& f, bool& wrong) {
  constexpr int64_t kStep = kGroup * Simd<T>::kLanes;
  Totals<T> totals;
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    group<T, kClip>(x + c, y + c, weight ? weight + c : nullptr, loss ? loss + c : nullptr, grad ? grad + c : nullptr,
                    f, totals);
  if (c < n) {  // the rest, filled up with ignored elements
    T part[5][kStep];
    for (int64_t i = 0; i < kStep; ++i) {
      const bool inside = c + i < n;
      part[0][i] = inside ? x[c + i] : T(0);
      part[1][i] = inside ? y[c + i] : T(-1);
      part[2][i] = inside && weight ? weight[c + i] : T(1);
    }
    group<T, kClip>(part[0], part[1], part[2], part[3], part[4], f, totals);
    if (loss) memcpy(loss + c, part[3], size_t(n - c) * sizeof(T));
    if (grad) memcpy(grad + c, part[4], size_t(n - c) * sizeof(T));
  }
  wrong = any<T>(totals.wrong);
  return double(sum<T>(totals.loss));
}

template <class S, class T>
bool convert(const S* x, int64_t stride, int64_t n, T* out) {
  bool wrong = false;  // a double that is not allowed can round to a float that is
  for (int64_t i = 0; i < n; ++i) {
    const S value = x[i * stride];
    out[i] = T(value);
    if (sizeof(S) > sizeof(T)) wrong |= !((value >= S(0) && value <= S(1)) || value == S(-1));
  }
  return wrong;
}

// Elements of one row as contiguous T: where they are if that is what they are, else in `buffer`.
template <class T>
const T* contiguous(const Array& a, int64_t b, int64_t c, int64_t n, T* buffer, bool& wrong) {
  const int64_t offset = b * a.stride[0] + c * a.stride[1], stride = a.stride[1];
  const DType own = sizeof(T) == 8 ? kF64 : kF32;
  if (a.dtype == own && stride == 1) return static_cast<const T*>(a.data) + offset;
  switch (a.dtype) {
    case kF32: convert(static_cast<const float*>(a.data) + offset, stride, n, buffer); break;
    case kF64: wrong = convert(static_cast<const double*>(a.data) + offset, stride, n, buffer); break;
    case kBF16: read_row_as(static_cast<const BFloat16*>(a.data) + offset, stride, n, buffer); break;
    case kF16: read_row_as(static_cast<const Float16*>(a.data) + offset, stride, n, buffer); break;
    case kU8: convert(static_cast<const uint8_t*>(a.data) + offset, stride, n, buffer); break;
    case kI8: convert(static_cast<const int8_t*>(a.data) + offset, stride, n, buffer); break;
    case kI16: convert(static_cast<const int16_t*>(a.data) + offset, stride, n, buffer); break;
    case kI32: convert(static_cast<const int32_t*>(a.data) + offset, stride, n, buffer); break;
    default: wrong = convert(static_cast<const int64_t*>(a.data) + offset, stride, n, buffer); break;
  }
  return buffer;
}

template <class T, bool kClip>
bool forward(const AslForward& a) {
  const int64_t B = a.logits.shape[0], C = a.logits.shape[1], chunks = (C + kChunk - 1) / kChunk;
  [[maybe_unused]] const int threads = B * C < 1 << 13 ? 1 : team_size(a.threads);
  const Focus<T> focus(a.gamma_neg, a.gamma_pos, a.clip, __builtin_log(a.eps), a.detach_focal_weight);
  Scratch<double> part(B * chunks);  // sums by chunk, so that the order does not depend on the threads
  const T* weight = static_cast<const T*>(a.class_weight);
  bool bad = false;
  if (a.slope != nullptr) want_huge_pages(a.slope, size_t(B * C) * sizeof(T));

#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : bad)
  for (int64_t i = 0; i < B * chunks; ++i) {
    const int64_t b = i / chunks, c = i % chunks * kChunk, n = C - c < kChunk ? C - c : kChunk, at = b * C + c;
    T buffer[2][kChunk];
    bool wide = false, ignore = false, wrong = false;
    const T* y = contiguous<T>(a.labels, b, c, n, buffer[1], wide);
    const T* x = contiguous<T>(a.logits, b, c, n, buffer[0], ignore);
    T* loss = a.sum_classes ? nullptr : static_cast<T*>(a.loss) + at;
    T* grad = a.slope == nullptr ? nullptr : static_cast<T*>(a.slope) + at;
    part[i] = chunk<T, kClip>(n, x, y, weight ? weight + c : nullptr, loss, grad, focus, wrong);
    bad = bad || wrong || wide;
  }
  if (a.sum_classes) {
    for (int64_t b = 0; b < B; ++b) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) total += part[b * chunks + k];
      static_cast<T*>(a.loss)[b] = T(total);
    }
  }
  return !bad;
}

template <class T>
void backward(const AslBackward& a) {
  const Array& out = a.grad_logits;
  const int64_t B = out.shape[0], C = out.shape[1], chunks = (C + kChunk - 1) / kChunk;
  [[maybe_unused]] const int threads = B * C < 1 << 14 ? 1 : team_size(a.threads);
  const int64_t stride = a.grad_loss.stride[1];
  want_huge_pages(out.data, size_t(B * C * element_size(out.dtype)));

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < B * chunks; ++i) {
    const int64_t b = i / chunks, c = i % chunks * kChunk, n = C - c < kChunk ? C - c : kChunk, at = b * C + c;
    const T* upstream = static_cast<const T*>(a.grad_loss.data) + b * a.grad_loss.stride[0] + c * stride;
    const T* grad = static_cast<const T*>(a.slope) + at;
    T buffer[kChunk];
    T* row = out.dtype == kF32 || out.dtype == kF64 ? static_cast<T*>(out.data) + at : buffer;
    if (stride == 0) {
      for (int64_t k = 0; k < n; ++k) row[k] = upstream[0] * grad[k];
    } else {
      for (int64_t k = 0; k < n; ++k) row[k] = upstream[k * stride] * grad[k];
    }
    if (row == buffer) write_row(out.data, out.dtype, at, n, buffer);
  }
}

template <class T>
bool forward(const AslForward& args) {
  return args.clip == 0 ? forward<T, false>(args) : forward<T, true>(args);
}

}  // namespace

bool asl_forward(const AslForward& args) { return SADCL_BY_DTYPE(asl_forward, forward, args.logits.dtype, args); }

void asl_backward(const AslBackward& args) { SADCL_BY_DTYPE(asl_backward, backward, args.grad_logits.dtype, args); }

SADCL_KERNELS_END
