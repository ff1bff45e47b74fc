// Prototype-to-sample contrastive loss: what is computed of an element, and of a class, once their sums are known.
#pragma once
#include "vmath.h"

SADCL_KERNELS_BEGIN

// A zero vector has cosine 0 and gradient 0.
SADCL_INLINE double over(double x, double norm) { return norm == 0 ? 0 : x / norm; }

SADCL_INLINE double pscl_score(double dot, double norm_x, double norm_p, double temperature) {
  return over(over(dot, norm_x), norm_p) / temperature;
}

// Of a class with log-sum-exps over its valid and over its positive images, `highest` of the scores.
SADCL_INLINE double pscl_class_loss(double all, double some, double highest, bool positive, bool valid, bool released) {
  if (positive) return all - some;
  return valid && (released || all != all) ? all - highest : 0;  // NaN stays NaN in either formulation
}

// The factors of an element's gradient: grad x = along p + across x, and its part of the sums of the class.
struct PsclFactors {
  double along, across;
  double turning;  // d loss / d score * score: the temperature's
  double cosines;  // the prototype's, see pscl_own
};

// grad_score = upstream (softmax over the valid images - softmax over the positive ones)
SADCL_INLINE PsclFactors pscl_factors(double grad_score, double score, double norm_x, double norm_p, double temperature,
                                      int64_t width) {
  // In one dimension a cosine is a sign: its gradient is 0, and not what rounding leaves of a difference.
  const double grad_cosine = width == 1 ? 0 * grad_score : grad_score / temperature;
  const double cosine = score * temperature, pull = grad_cosine * cosine;
  return {over(over(grad_cosine, norm_p), norm_x), -over(over(pull, norm_x), norm_x), grad_score * score, pull};
}

// grad p = own p + sum of along x
SADCL_INLINE double pscl_own(double cosines, double norm_p) { return -over(over(cosines, norm_p), norm_p); }

SADCL_KERNELS_END
