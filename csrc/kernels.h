// What the per-ISA kernel files offer to the rest: one list of functions, and a table of them per instruction set.
#pragma once
#include "array.h"
#include "asl.h"
#include "group_classifier.h"
#include "group_rows.h"
#include "label_attention.h"
#include "linear.h"
#include "mlc.h"
#include "pscl.h"
#include "sscl.h"
#include "two_way.h"
#include "zlpr.h"

// Every kernel: X(result, name, arguments). Declarations, KernelTable and dispatch.cpp's tables are made from this
// list. The first parts are what avx512_bf16 and avx512_popcnt have a copy of.
#define SADCL_SSCL_KERNELS(X)                 \
  X(void, sscl_forward, (const SsclForward&)) \
  X(double, sscl_backward, (const SsclBackward&)) /* returns d loss / d temperature */
#define SADCL_MLC_KERNELS(X)                                                                    \
  X(bool, mlc_forward, (const MlcForward&))     /* false if a label is not allowed, as below */ \
  X(double, mlc_backward, (const MlcBackward&)) /* returns d loss / d temperature */            \
  X(bool, group_rows_forward, (const GroupRowsForward&))                                        \
  X(void, group_rows_backward, (const GroupRowsBackward&))
#define SADCL_ATTENTION_KERNELS(X)                         \
  X(void, label_attention_forward, (const LabelAttention&)) \
  X(void, label_attention_backward, (const LabelAttentionBackward&))
#define SADCL_KERNELS(X)                                                                     \
  SADCL_SSCL_KERNELS(X)                                                                      \
  SADCL_MLC_KERNELS(X)                                                                       \
  SADCL_ATTENTION_KERNELS(X)                                                                 \
  X(bool, asl_forward, (const AslForward&)) /* returns false if a label is not allowed */    \
  X(void, asl_backward, (const AslBackward&))                                                \
  X(bool, zlpr_forward, (const ZlprForward&)) /* returns false if a label is not allowed */  \
  X(void, zlpr_backward, (const ZlprBackward&))                                              \
  X(bool, two_way_forward, (const TwoWayForward&))                                           \
  X(void, two_way_backward, (const TwoWayBackward&))                                         \
  X(void, pscl_forward, (const PsclForward&))                                                \
  X(double, pscl_backward, (const PsclBackward&)) /* returns d loss / d temperature */       \
  X(void, group_classifier_forward, (const GroupClassifierForward&))                         \
  X(void, group_classifier_backward, (const GroupClassifierBackward&))                       \
  X(void, linear, (const Linear&))                                                           \
  X(void, exp2_array, (const Array& x, const Array& out)) /* simd.h's, for the test of it */ \
  X(double, fma_peak, (int threads))                      /* float32 FLOP/s, for benchmarks */

namespace sadcl {

struct KernelTable {
  const char* isa;
#define SADCL_FIELD(result, name, arguments) result(*name) arguments;
  SADCL_KERNELS(SADCL_FIELD)
#undef SADCL_FIELD
};

// Every kernel file defines these in the namespace of its instruction set; setup.py says which there are (SADCL_HAS_*).
#define SADCL_DECLARE(result, name, arguments) result name arguments;
namespace portable {
SADCL_KERNELS(SADCL_DECLARE)
}

}  // namespace sadcl
