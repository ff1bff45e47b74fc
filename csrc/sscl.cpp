// Sample-to-sample contrastive loss (SPEC section 2), compiled once per instruction set. Read in this order:
// gemm.h (products), sscl_rows.h (gather), sscl_blocks.h (schedule), sscl_forward.h, sscl_backward.h, sscl_released.h.
#include "sscl_backward.h"

SADCL_KERNELS_BEGIN

void sscl_forward(const SsclForward& args) {
  args.rows.features.dtype == kF64 ? forward<double>(args) : forward<float>(args);
}

double sscl_backward(const SsclBackward& args) {
  return args.rows.features.dtype == kF64 ? backward<double>(args) : backward<float>(args);
}

SADCL_KERNELS_END
