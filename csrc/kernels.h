// What the per-ISA kernel files offer to the rest: argument structs and one table of functions per instruction set.
#pragma once
#include "array.h"
#include "asl.h"
#include "label_attention.h"
#include "linear.h"
#include "group_classifier.h"
#include "pscl.h"

namespace sadcl {

// Active rows of `features [B, V, C, D]`: compact row i = p * V + v is feature row (pairs[p] / C, v, pairs[p] % C).
// Classes are the segments class_ptr[k] <= p < class_ptr[k + 1], k < num_classes.
struct SsclRows {
  Array features;
  const int32_t* pairs;
  const int32_t* class_ptr;
  int64_t num_classes;
  int64_t capacity;  // entries of `pairs`; class_ptr[num_classes] of them are active
  double temperature;
  bool normalize;
  int threads;
};

// Outputs arrive uninitialised. T is the accumulation type: double for float64 features, else float.
struct SsclForward {
  SsclRows rows;
  bool released;
  void* row_loss;  // T [B, V, C]
  void* lse;       // T [V * capacity]
  double* norm;    // [V * capacity]
  void* tile;      // T [tile_size]: holds the N x N products z_i.z_j if they fit
  int64_t tile_size;
};

struct SsclBackward {
  SsclRows rows;
  Array grad_rows;  // T [B, V, C], any strides
  const void* lse;
  const double* norm;
  const void* tile;
  int64_t tile_size;
  Array grad_features;  // [B, V, C, D] of features' dtype; all of it contiguous, or each view is (the dual loss)
  bool add_to_first;    // view 0 holds another gradient already, to be added to; needs the layout with whole views
};

// Defined by the copies of the kernel files that setup.py compiled; SADCL_HAS_* says which.
#define SADCL_DECLARE(name)                      \
  namespace name {                               \
  void sscl_forward(const SsclForward&);         \
  double sscl_backward(const SsclBackward&);     \
  void exp2_array(const Array&, const Array&);   \
  double fma_peak(int threads);                  \
  void linear(const Linear&);                    \
  void label_attention_forward(const LabelAttention&);             \
  void label_attention_backward(const LabelAttentionBackward&);    \
  bool asl_forward(const AslForward&);           \
  void asl_backward(const AslBackward&);         \
  void pscl_forward(const PsclForward&);         \
  double pscl_backward(const PsclBackward&);     \
  void group_classifier_forward(const GroupClassifierForward&);    \
  void group_classifier_backward(const GroupClassifierBackward&);  \
  }
SADCL_DECLARE(portable)

struct KernelTable {
  const char* isa;
  void (*sscl_forward)(const SsclForward&);
  double (*sscl_backward)(const SsclBackward&);  // returns d loss / d temperature
  bool (*asl_forward)(const AslForward&);        // returns false if a label is not allowed
  void (*asl_backward)(const AslBackward&);
  void (*pscl_forward)(const PsclForward&);
  double (*pscl_backward)(const PsclBackward&);  // returns d loss / d temperature
  void (*group_classifier_forward)(const GroupClassifierForward&);
  void (*group_classifier_backward)(const GroupClassifierBackward&);
  void (*linear)(const Linear&);
  void (*label_attention_forward)(const LabelAttention&);
  void (*label_attention_backward)(const LabelAttentionBackward&);
  void (*exp2)(const Array& x, const Array& out);  // simd.h's, for the test that measures it
  double (*fma_peak)(int threads);                 // float32 FLOP/s, for benchmarks
};

// compact.cpp. `bad` receives up to `max_bad` distinct offending values; returns how many there are (0: all is well).
struct Compact {
  Array labels;  // [B, C]
  int32_t* pairs;
  int32_t* class_ptr;
  int8_t* target;
  int threads;
};
int compact(const Compact& args, double* bad, int max_bad);

}  // namespace sadcl
