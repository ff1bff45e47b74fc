// Asymmetric loss of an element (on a CPU: of a vector of them) and its derivative by the logit.
#pragma once
#include "vmath.h"

SADCL_KERNELS_BEGIN

template <class T>
struct Focus {
  T gamma_neg, gamma_pos, clip, floor;
  int whole_neg, whole_pos;  // the exponent if it is a small integer, else -1
  bool detach;

  Focus(double neg, double pos, double margin, double log_eps, bool detach_focal_weight)
      : gamma_neg(T(neg)), gamma_pos(T(pos)), clip(T(margin)), floor(T(log_eps)), whole_neg(whole(neg)),
        whole_pos(whole(pos)), detach(detach_focal_weight) {}
  static int whole(double gamma) { return gamma <= 16 && gamma == int(gamma) ? int(gamma) : -1; }
};

// base^gamma and, for a given d base / d logit, its derivative.
template <class T>
struct Power {
  vec<T> value, slope;
  SADCL_INLINE Power(vec<T> base, vec<T> d_base, T gamma, int whole) {
    if (whole == 0) {
      value = splat<T>(1), slope = vec<T>{};
    } else if (whole == 4) {  // the usual one, without a loop
      const vec<T> lower = base * base * base;
      value = lower * base, slope = lower * gamma * d_base;
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

// y = 0 in every lane, the sigmoid known.
template <class T, bool kClip>
SADCL_INLINE Element<T> all_negative(vec<T> x, const Sigmoid<T>& s, const Focus<T>& f) {
  const Negative<T, kClip> n(x, s, f);
  return weighted<T>(n.log_q, n.d_log_q, Power<T>(n.clipped, n.d_clipped, f.gamma_neg, f.whole_neg), f.detach);
}

template <class T, bool kClip>
SADCL_INLINE Element<T> all_negative(vec<T> x, const Focus<T>& f) {
  Sigmoid<T> s;
  s.template set<!kClip>(x);
  return all_negative<T, kClip>(x, s, f);
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

SADCL_KERNELS_END
