// Sample-to-sample contrastive loss, compiled once per instruction set. Read in this order:
// panels.h (products), pairs.h and sscl_rows.h (gather), sscl_blocks.h (schedule), sscl_forward.h, sscl_pairs.h (the
// gradient's product in bfloat16), sscl_backward.h, sscl_released.h.
#include "sscl_backward.h"

SADCL_KERNELS_BEGIN

void sscl_forward(const SsclForward& args) { SADCL_BY_DTYPE(sscl_forward, forward, args.rows.features.dtype, args); }

double sscl_backward(const SsclBackward& args) {
  return SADCL_BY_DTYPE(sscl_backward, backward, args.rows.features.dtype, args);
}

SADCL_KERNELS_END
