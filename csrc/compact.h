// Arguments of compaction.
#pragma once
#include "array.h"

namespace sadcl {

struct Compact {
  Array labels;        // [B, C], any real dtype
  int32_t* pairs;      // [B * C]
  int32_t* class_ptr;  // [C + 1]
  int8_t* target;      // [B, C]
  int threads;
};
// `bad` receives up to `max_bad` distinct offending values; returns how many there are (0: all is well).
int compact(const Compact& args, double* bad, int max_bad);

}  // namespace sadcl
