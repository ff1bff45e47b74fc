// Asymmetric loss: value and derivative in one sweep; compiled once per instruction set.
//
// A batch is cut into chunks of kChunk classes of one image. A chunk's inputs are contiguous T: read in place if they
// are already, converted into the cache otherwise. In a multi-label batch nearly all labels are 0: vectors with nothing
// but zeros take a path that knows only the negative half of the formula. What of them is under the margin is 0 without
// being computed, the rest moves together: with AVX-512 lane by lane, elsewhere whole vectors.
#include "asl.h"

#include "asl_formula.h"
#include "convert.h"
#include "scratch.h"

SADCL_KERNELS_BEGIN
namespace {

constexpr int64_t kChunk = 1024;  // arrays of 4 KB: the first-level cache holds a chunk

template <class T>
struct Totals {
  vec<T> loss = {};
  typename Simd<T>::I wrong = {};  // lanes with a label that is not allowed
};

// Of a chunk in a row, and a vector more; arrays of it that follow each other do not meet in an address's low 12 bits,
// by which a processor takes a load for one of what was just stored.
constexpr int64_t kRoom = kChunk + 256;

// The lanes that are not under `cut` (NaN is not), as bits; without AVX-512 all of them if one is.
template <class T>
SADCL_INLINE uint32_t not_under(vec<T> x, T cut) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(x), __m512(splat<T>(cut)), _CMP_NLT_UQ);
#else
  return any<T>(~(x < cut)) ? (1u << Simd<T>::kLanes) - 1 : 0;
#endif
}

// Writes the lanes of a mask next to each other, and says how many they are.
template <class T>
SADCL_INLINE int64_t pack(T* to, vec<T> x, uint32_t mask) {
#if defined(__AVX512F__)
  storeu(to, vec<T>(_mm512_maskz_compress_ps(__mmask16(mask), __m512(x))));
#else
  storeu(to, x);
#endif
  return __builtin_popcount(mask);
}

// The lanes of a mask back in their places, 0 in the others.
template <class T>
SADCL_INLINE vec<T> unpack(const T* from, uint32_t mask) {
#if defined(__AVX512F__)
  return vec<T>(_mm512_maskz_expand_ps(__mmask16(mask), __m512(loadu(from))));
#else
  return mask != 0 ? loadu(from) : vec<T>{};
#endif
}

template <class T>
struct Call {
  Focus<T> focus;
  T cut;  // a negative's logit under which its probability is surely under the margin
};

// The formula of negatives with a margin as it usually is, gamma_neg a whole number of 2 or more and the margin above
// eps: no floor binds, and what the margin holds at 0 or a NaN decides is a factor of all that it should decide.
template <class T>
struct Usual {
  vec<T> p, not_p;

  SADCL_INLINE explicit Usual(vec<T> x) {
    const vec<T> e = exp<T>(-vmax<T>(splat<T>(T(-87)), x));  // NaN stays; what is lower is under any margin
    p = T(1) / (e + T(1));
    not_p = e * p;
  }
  SADCL_INLINE Usual(vec<T> probability, vec<T> rest) : p(probability), not_p(rest) {}

  SADCL_INLINE Element<T> element(const Focus<T>& f) const {
    const vec<T> clipped = vmax<T>(vec<T>{}, p - f.clip), sum = not_p + f.clip;
    const vec<T> q = T(1) < sum ? splat<T>(1) : sum;
    Split<T> split(q);
    split.fraction = split.exponent == T(0) ? -clipped : split.fraction;  // near q = 1 what is known best
    const vec<T> divisor = split.fraction + T(2), inverse = T(1) / (divisor * q);
    const vec<T> log_q =
        split.exponent * T(0.693147180559945309417) + twice_atanh<T>(Math<T>::kLog, split.fraction * q * inverse);
    vec<T> lower = clipped;
    for (int i = 2; i < f.whole_neg; ++i) lower *= clipped;
    vec<T> pull = clipped * (divisor * inverse);
    if (!f.detach) pull -= log_q * f.gamma_neg;
    return {-(log_q * clipped) * lower, p * not_p * lower * pull};
  }
};

// What a vector gives; `loss` null: only the sum is wanted; `grad` null: no derivative.
template <class T>
SADCL_INLINE void give(Element<T> e, int64_t at, const T* weight, T* loss, T* grad, Totals<T>& totals) {
  if (weight != nullptr) e.loss *= loadu(weight + at), e.grad *= loadu(weight + at);
  if (loss != nullptr) storeu(loss + at, e.loss);
  if (grad != nullptr) storeu(grad + at, e.grad);
  totals.loss += e.loss;
}

// n elements, whole vectors. The formula goes in two loops: of its 110 instructions, most of which wait for the one
// before, a processor has hardly more than one vector in flight.
template <class T, class S, bool kClip, bool kUsual>
void vectors(int64_t n, const S* x, const T* y, const T* weight, T* loss, T* grad, const Call<T>& call,
             Totals<T>& totals) {
  constexpr int L = Simd<T>::kLanes;
  T logit[kRoom], p[kRoom], not_p[kRoom], softplus[kClip ? 1 : kRoom];
  uint32_t masks[kChunk / L], mixed[kChunk / L];
  int64_t count = 0, others = 0;
  for (int64_t i = 0; i < n; i += L) {
    const bool negative = !any<T>(bits_of<T>(loadu(y + i)));
    const vec<T> values = widened(x + i);
    masks[i / L] = !negative ? 0 : kClip ? not_under<T>(values, call.cut) : (1u << L) - 1;
    count += pack<T>(logit + count, values, masks[i / L]);
    mixed[others] = uint32_t(i);
    others += !negative;
  }
  storeu(logit + count, splat<T>(T(-1e4)));  // fills up the last vector, with losses of 0
  for (int64_t i = 0; i < count; i += L) {
    if (kUsual) {
      const Usual<T> s(loadu(logit + i));
      storeu(p + i, s.p), storeu(not_p + i, s.not_p);
      continue;
    }
    Sigmoid<T> s;
    s.template set<!kClip>(loadu(logit + i));
    storeu(p + i, s.p), storeu(not_p + i, s.not_p);
    if (!kClip) storeu(softplus + i, s.softplus);
  }
  for (int64_t i = 0, from = 0, done = 0; i < n; i += L) {
    __builtin_prefetch(x + i + kChunk),
        __builtin_prefetch(y + i + kChunk);  // the next chunk's, while this one is computed
    const uint32_t mask = masks[i / L];
    const int64_t to = from + __builtin_popcount(mask);
    if (done < to) {  // written as it is computed: stores in a row would wait for memory, with nothing to do meanwhile
      Element<T> e;
      if (kUsual) {
        e = Usual<T>(loadu(p + done), loadu(not_p + done)).element(call.focus);
      } else {
        Sigmoid<T> s;
        s.p = loadu(p + done), s.not_p = loadu(not_p + done), s.slope = s.p * s.not_p;
        if (!kClip) s.softplus = loadu(softplus + done);
        e = all_negative<T, kClip>(loadu(logit + done), s, call.focus);
      }
      storeu(p + done, e.loss), storeu(not_p + done, e.grad);
      done += L;
    }
    give<T>({unpack(p + from, mask), unpack(not_p + from, mask)}, i, weight, loss, grad, totals);
    from = to;
  }
  for (int64_t k = 0; k < others; ++k) {
    const int64_t i = mixed[k];
    const vec<T> label = loadu(y + i);
    totals.wrong |= ~(((label >= T(0)) & (label <= T(1))) | (label == T(-1)));
    give(any_label<T, kClip>(widened(x + i), label, call.focus), i, weight, loss, grad, totals);
  }
}

// One chunk of contiguous inputs; returns the sum of its losses.
template <class T, class S, bool kClip, bool kUsual>
double chunk(int64_t n, const S* x, const T* y, const T* weight, T* loss, T* grad, const Call<T>& call, bool& wrong) {
  constexpr int64_t L = Simd<T>::kLanes;
  Totals<T> totals;
  const int64_t c = n / L * L;
  vectors<T, S, kClip, kUsual>(c, x, y, weight, loss, grad, call, totals);
  if (c < n) {  // the rest, filled up with ignored elements
    T part[5][L];
    for (int64_t i = 0; i < L; ++i) {
      const bool inside = c + i < n;
      part[0][i] = inside ? widen(x[c + i]) : T(0);
      part[1][i] = inside ? y[c + i] : T(-1);
      part[2][i] = inside && weight ? weight[c + i] : T(1);
    }
    vectors<T, T, kClip, kUsual>(L, part[0], part[1], part[2], part[3], part[4], call, totals);
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

// Logits of one row as contiguous S: T made so, or what they are, to be widened as they are read.
template <class T, class S>
const S* logits_of(const Array& a, int64_t b, int64_t c, int64_t n, T* buffer, bool& wrong) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return contiguous<T>(a, b, c, n, buffer, wrong);
  } else {
    return static_cast<const S*>(a.data) + b * a.stride[0] + c;
  }
}

template <class T, class S, bool kClip, bool kUsual>
bool forward(const AslForward& a) {
  const int64_t B = a.logits.shape[0], C = a.logits.shape[1], chunks = (C + kChunk - 1) / kChunk;
  [[maybe_unused]] const int threads = B * C < 1 << 13 ? 1 : team_size(a.threads);
  const Call<T> call = {{a.gamma_neg, a.gamma_pos, a.clip, __builtin_log(a.eps), a.detach_focal_weight},
                        T(__builtin_log(a.clip / (1 - a.clip)) - 0.01)};
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
    const S* x = logits_of<T, S>(a.logits, b, c, n, buffer[0], ignore);
    T* loss = a.sum_classes ? nullptr : static_cast<T*>(a.loss) + at;
    T* grad = a.slope == nullptr ? nullptr : static_cast<T*>(a.slope) + at;
    part[i] = chunk<T, S, kClip, kUsual>(n, x, y, weight ? weight + c : nullptr, loss, grad, call, wrong);
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

template <class T, class S>
bool forward(const AslForward& args) {
  if (args.clip == 0) return forward<T, S, false, false>(args);
  const bool usual = Focus<T>::whole(args.gamma_neg) >= 2 && args.clip > 2 * args.eps;
  return usual ? forward<T, S, true, true>(args) : forward<T, S, true, false>(args);
}

template <class T>
bool forward(const AslForward& args) {
  if (sizeof(T) == 4 && args.logits.stride[1] == 1) {
    if (args.logits.dtype == kBF16) return forward<float, BFloat16>(args);
#ifdef __F16C__  // without the instruction a chunk at a time is quicker
    if (args.logits.dtype == kF16) return forward<float, Float16>(args);
#endif
  }
  return forward<T, T>(args);
}

}  // namespace

bool asl_forward(const AslForward& args) { return SADCL_BY_DTYPE(asl_forward, forward, args.logits.dtype, args); }

void asl_backward(const AslBackward& args) { SADCL_BY_DTYPE(asl_backward, backward, args.grad_logits.dtype, args); }

SADCL_KERNELS_END
