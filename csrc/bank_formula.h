// Memory bank: which label features are written.
#pragma once
#include "simd.h"

SADCL_KERNELS_BEGIN

// Compared in the scores' dtype, as torch does: float32 0.8 does not exceed a threshold of 0.8.
SADCL_INLINE bool bank_exceeds(double score, bool wide, bool probabilities, double threshold) {
  const double p = probabilities ? score : 1 / (1 + ::exp(-score));
  return wide ? p > threshold : float(p) > float(threshold);
}

SADCL_KERNELS_END
