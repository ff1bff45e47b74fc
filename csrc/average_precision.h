// Arguments of average precision.
#pragma once
#include "array.h"

namespace sadcl {

enum ApMethod : int { kVocArea = 0, kSklearn = 1, kVoc11 = 2 };

struct AveragePrecision {
  Array scores;  // [n, C] float32 or float64, no NaN, n < 2^32
  Array target;  // [n, C] int8: 1, 0, or -1 (ignored)
  ApMethod method;
  double* ap;  // [C]; NaN for a class without a positive
  int threads;
};
void average_precision(const AveragePrecision& args);

}  // namespace sadcl
