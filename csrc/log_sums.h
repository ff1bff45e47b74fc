// What ZLPR and the two-way loss share: logits parted into negatives and positives, and log-sum-exps that grow.
#pragma once
#include <math.h>

#include "convert.h"
#include "vmath.h"

SADCL_KERNELS_BEGIN

// negative[i] = x of a negative, positive[i] = -x of a positive, -inf elsewhere: whatever stands in an ignored place is
// seen by nobody. `x` is both input and output: positive takes its place. False if a label is not 0, 1 or -1.
template <class S, class T>
bool part(const S* label, int64_t stride, int64_t n, T* x, T* negative) {
  constexpr bool kSigned = S(-1) < S(0);
  bool fine = true;
  for (int64_t i = 0; i < n; ++i) {
    const S y = label[i * stride];
    const bool no = y == S(0), yes = y == S(1);
    fine &= no | yes | (kSigned && y == S(-1));
    negative[i] = no ? x[i] : T(-HUGE_VAL);
    x[i] = yes ? -x[i] : T(-HUGE_VAL);
  }
  return fine;
}

template <class S, class T>
bool part_widened(const S* label, int64_t stride, int64_t n, T* x, T* negative) {
  bool fine = true;
  for (int64_t i = 0; i < n; ++i) {
    const float y = widen(label[i * stride]);
    fine &= part(&y, 1, 1, x + i, negative + i);
  }
  return fine;
}

// Classes [c, c + n) of image b.
template <class T>
bool part_row(const Array& logits, const Array& labels, int64_t b, int64_t c, int64_t n, T* negative, T* positive) {
  read_row(logits, b * logits.stride[0] + c * logits.stride[1], logits.stride[1], n, positive);
  const int64_t at = b * labels.stride[0] + c * labels.stride[1], stride = labels.stride[1];
  const auto from = [&](auto type) { return static_cast<const decltype(type)*>(labels.data) + at; };
  switch (labels.dtype) {
    case kF32: return part(from(float()), stride, n, positive, negative);
    case kF64: return part(from(double()), stride, n, positive, negative);
    case kBF16: return part_widened(from(BFloat16()), stride, n, positive, negative);
    case kF16: return part_widened(from(Float16()), stride, n, positive, negative);
    case kU8: return part(from(uint8_t()), stride, n, positive, negative);
    case kI8: return part(from(int8_t()), stride, n, positive, negative);
    case kI16: return part(from(int16_t()), stride, n, positive, negative);
    case kI32: return part(from(int32_t()), stride, n, positive, negative);
    default: return part(from(int64_t()), stride, n, positive, negative);
  }
}

template <class T>
T highest(const T* x, int64_t n) {
  constexpr int L = Simd<T>::kLanes;
  vec<T> best = splat(T(-HUGE_VAL));
  int64_t i = 0;
  for (; i + L <= n; i += L) best = vmax<T>(loadu(x + i), best);
  T value = T(-HUGE_VAL);
  for (int l = 0; l < L; ++l) value = best[l] > value ? best[l] : value;
  for (; i < n; ++i) value = x[i] > value ? x[i] : value;
  return value;
}

// Sum of e^(x - pivot), no x above the pivot.
template <class T>
double sum_of_exp(const T* x, int64_t n, T pivot) {
  constexpr int L = Simd<T>::kLanes;
  vec<T> total = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) total += exp<T>(loadu(x + i) - pivot);
  vec<T> tail = splat(T(-HUGE_VAL));
  for (int l = 0; i + l < n; ++l) tail[l] = x[i + l] - pivot;
  return double(sum<T>(total + exp<T>(tail)));
}

// log of a sum of exponentials that come in pieces; peak -inf: nothing but -inf came.
template <class T>
struct LogSum {
  T peak = T(-HUGE_VAL);
  double sum = 0;

  void add(const T* x, int64_t n) {
    raise(highest(x, n));
    sum += sum_of_exp(x, n, pivot());
  }
  // Merges e^peak times `total`.
  void add(T other_peak, double total) {
    raise(other_peak);
    sum += other_peak == T(-HUGE_VAL) ? total : total * ::exp(double(other_peak) - double(peak));
  }
  double value() const { return sum == 0 ? -HUGE_VAL : double(pivot()) + ::log(sum); }

 private:
  T pivot() const { return peak == T(-HUGE_VAL) ? T(0) : peak; }
  void raise(T candidate) {
    if (!(candidate > peak)) return;
    if (peak != T(-HUGE_VAL)) sum *= ::exp(double(peak) - double(candidate));
    peak = candidate;
  }
};

// e^(x - lse) as e^(x - high) * factor: a float32 of a large lse would lose the digits that count. Nothing (-inf): 0.
template <class T>
struct Shift {
  T high = 0, factor = 0;
  Shift() = default;
  explicit Shift(double lse, double scale) {
    if (lse == -HUGE_VAL) return;
    high = T(lse);
    factor = T(scale * ::exp(double(high) - lse));
  }
};

SADCL_KERNELS_END
