// Asymmetric loss: value and derivative in one sweep; compiled once per instruction set.
//
// A batch is cut into chunks of kChunk classes of one image. A chunk's inputs are contiguous T: read in place if they
// are already, converted into the cache otherwise. In a multi-label batch nearly all labels are 0, so groups of vectors
// with nothing but zeros take a path that knows only the negative half of the formula.
#include "asl.h"

#include "convert.h"
#include "scratch.h"
#include "vmath.h"

SADCL_KERNELS_BEGIN
namespace {

constexpr int64_t kChunk = 1024;  // 3 arrays of 4 KB: the first-level cache holds a chunk
constexpr int kGroup = 4;         // vectors looked at together

template <class T>
struct Focus {
  T gamma_neg, gamma_pos, clip, floor;
  int whole_neg, whole_pos;  // the exponent if it is a small integer, else -1
  bool detach;

  explicit Focus(const AslForward& a)
      : gamma_neg(T(a.gamma_neg)), gamma_pos(T(a.gamma_pos)), clip(T(a.clip)), floor(T(__builtin_log(a.eps))),
        whole_neg(whole(a.gamma_neg)), whole_pos(whole(a.gamma_pos)), detach(a.detach_focal_weight) {}
  static int whole(double gamma) { return gamma <= 16 && gamma == int(gamma) ? int(gamma) : -1; }
};

// base^gamma and, for a given d base / d logit, its derivative.
template <class T>
struct Power {
  vec<T> value, slope;
  SADCL_INLINE Power(vec<T> base, vec<T> d_base, T gamma, int whole) {
    if (whole == 0) {
      value = splat<T>(1), slope = vec<T>{};
    } else if (whole > 0) {
      vec<T> lower = splat<T>(1);
      for (int i = 1; i < whole; ++i) lower *= base;
      value = lower * base, slope = lower * gamma * d_base;
    } else {
      value = base > T(0) ? exp<T>(log<T>(base) * gamma) : vec<T>{};
      // The quotient first: it is finite where gamma < 1 and base is small.
      slope = base > T(0) ? value * gamma * (d_base / base) : vec<T>{};
    }
  }
};

template <class T>
struct Element {
  vec<T> loss, grad;
};

// What both halves of the formula share: p = sigmoid(x), 1 - p, their product.
template <class T>
struct Sigmoid {
  vec<T> p, not_p, slope, softplus;  // softplus = log(1 + e^-|x|), where asked for
  template <bool kSoftplus>
  SADCL_INLINE void set(vec<T> x) {
    const vec<T> e = exp<T>(x < T(0) ? x : -x);
    const vec<T> one_e = e + T(1), two_e = e + T(2);
    vec<T> large;
    if (kSoftplus) {
      const vec<T> inverse = T(1) / (one_e * two_e);  // one division for both quotients
      large = two_e * inverse;
      softplus = log1p_of<T>(e * one_e * inverse);
    } else {
      large = T(1) / one_e;
    }
    const vec<T> small = e * large;
    p = x < T(0) ? small : large;
    not_p = x < T(0) ? large : small;
    slope = large * small;
  }
};

// Below the floor a logarithm is the floor and its derivative 0. Comparisons so that NaN stays.
template <class T>
SADCL_INLINE void apply_floor(vec<T>& logarithm, vec<T>& derivative, T floor) {
  derivative = logarithm <= floor ? vec<T>{} : derivative;
  logarithm = logarithm <= floor ? splat<T>(floor) : logarithm;
}

// log q and its derivative; clipped is 1 - q.
template <class T, bool kClip>
struct Negative {
  vec<T> clipped, log_q, d_log_q, d_clipped;
  SADCL_INLINE Negative(vec<T> x, const Sigmoid<T>& s, const Focus<T>& f) {
    if (kClip) {
      clipped = s.p - f.clip;
      clipped = clipped < T(0) ? vec<T>{} : clipped;
      vec<T> q = s.not_p + f.clip;
      q = q > T(1) ? splat<T>(1) : q;
      Split<T> split(q);
      // Near q = 1 what is known best is 1 - q.
      split.fraction = split.exponent == T(0) ? -clipped : split.fraction;
      const vec<T> divisor = split.fraction + T(2), inverse = T(1) / (divisor * q);
      log_q = log_of<T>(split, split.fraction * q * inverse);
      log_q = x != x ? x : log_q;
      d_clipped = clipped > T(0) ? s.slope : vec<T>{};
      d_log_q = -d_clipped * (divisor * inverse);
    } else {
      clipped = s.p;
      log_q = (x > T(0) ? -x : vec<T>{}) - s.softplus;
      d_clipped = s.slope;
      d_log_q = -s.p;
    }
    apply_floor<T>(log_q, d_log_q, f.floor);
  }
};

template <class T>
struct Positive {
  vec<T> log_p, d_log_p;
  SADCL_INLINE Positive(vec<T> x, const Sigmoid<T>& s, const Focus<T>& f) {
    log_p = (x < T(0) ? x : vec<T>{}) - s.softplus;
    d_log_p = s.not_p;
    apply_floor<T>(log_p, d_log_p, f.floor);
  }
};

template <class T>
SADCL_INLINE Element<T> weighted(vec<T> likelihood, vec<T> d_likelihood, const Power<T>& weight, bool detach) {
  Element<T> out = {-likelihood * weight.value, -d_likelihood * weight.value};
  if (!detach) out.grad -= likelihood * weight.slope;
  return out;
}

// y = 0 in every lane.
template <class T, bool kClip>
SADCL_INLINE Element<T> all_negative(vec<T> x, const Focus<T>& f) {
  Sigmoid<T> s;
  s.template set<!kClip>(x);
  const Negative<T, kClip> n(x, s, f);
  return weighted<T>(n.log_q, n.d_log_q, Power<T>(n.clipped, n.d_clipped, f.gamma_neg, f.whole_neg), f.detach);
}

// Any y in [0, 1], or -1 for ignored.
template <class T, bool kClip>
Element<T> any_label(vec<T> x, vec<T> y, const Focus<T>& f) {
  Sigmoid<T> s;
  s.template set<true>(x);
  const Negative<T, kClip> n(x, s, f);
  const Positive<T> p(x, s, f);
  Element<T> out;
  if (any<T>((y > T(0)) & (y < T(1)))) {
    const vec<T> not_y = T(1) - y, gamma = f.gamma_pos * y + f.gamma_neg * not_y;
    const vec<T> base = y * s.not_p + not_y * n.clipped, d_base = not_y * n.d_clipped - y * s.slope;
    const vec<T> likelihood = y * p.log_p + not_y * n.log_q, d_likelihood = y * p.d_log_p + not_y * n.d_log_q;
    Power<T> weight(base, d_base, T(1), 1);
    weight.value = base > T(0) ? exp<T>(log<T>(base) * gamma) : gamma == T(0) ? splat<T>(1) : vec<T>{};
    weight.slope = base > T(0) ? weight.value * gamma * (d_base / base) : vec<T>{};
    out = weighted<T>(likelihood, d_likelihood, weight, f.detach);
  } else {
    const Element<T> no =
        weighted<T>(n.log_q, n.d_log_q, Power<T>(n.clipped, n.d_clipped, f.gamma_neg, f.whole_neg), f.detach);
    const Element<T> yes =
        weighted<T>(p.log_p, p.d_log_p, Power<T>(s.not_p, -s.slope, f.gamma_pos, f.whole_pos), f.detach);
    out.loss = y == T(1) ? yes.loss : no.loss;
    out.grad = y == T(1) ? yes.grad : no.grad;
  }
  out.loss = y == T(-1) ? vec<T>{} : out.loss;
  out.grad = y == T(-1) ? vec<T>{} : out.grad;
  return out;
}

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
  const Focus<T> focus(a);
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
