// Memory-bank update: a block an (image, class), which reads a label and a score and leaves, or copies a row. At B =
// 32, C = 80 about 90 rows of 2,560 are copied.
//
// Defines: SLOTS, FEATURES, SCORES, LABELS (types).
#include "bank_formula.h"
#include "device.h"

SADCL_KERNELS_BEGIN

constexpr int kThreads = 128;

struct Strides {
  int64_t slots[3], features[3], scores[2], labels[2];
};

extern "C" __global__ void __launch_bounds__(kThreads)
    bank_update(SLOTS* slots, const FEATURES* features, const SCORES* scores, const LABELS* labels, int64_t C,
                int64_t E, double threshold, int64_t probabilities, Strides stride) {
  const int64_t b = blockIdx.x / C, c = blockIdx.x % C;
  if (target_of(labels[b * stride.labels[0] + c * stride.labels[1]]) != 1) return;
  const double score = double(widen(scores[b * stride.scores[0] + c * stride.scores[1]]));
  if (!bank_exceeds(score, sizeof(SCORES) == 8, probabilities != 0, threshold)) return;
  const FEATURES* from = features + b * stride.features[0] + c * stride.features[1];
  SLOTS* to = slots + b * stride.slots[0] + c * stride.slots[1];
  for (int64_t e = threadIdx.x; e < E; e += kThreads)
    to[e * stride.slots[2]] = narrow<SLOTS>(widen(from[e * stride.features[2]]));
}

SADCL_KERNELS_END
