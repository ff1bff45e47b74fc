// Arguments of label attention, forward and backward. T is the accumulation type: double for float64, else float.
//
// B images, C labels, L positions, E = heads * d wide. Q = 1 if the batch shares its queries, else B. What has no
// `Array` is contiguous. Matrices of weights are kept position-major, [B, L, heads * C], so that the softmax over
// positions runs down the columns, a vector of labels at a time.
#pragma once
#include "array.h"

namespace sadcl {

struct LabelAttention {
  Array query;               // [C, E] or [B, C, E]
  Array memory;              // [B, L, E]
  Array memory_pos;          // [B, L, E], or no data
  Array in_weight;           // [3E, E]
  Array in_bias;             // [3E], or no data
  Array out_weight;          // [E, E]
  Array out_bias;            // [E], or no data
  const uint8_t* padded;     // [B, L] or null
  const uint8_t* survivors;  // [B, L, heads * C] or null: what dropout leaves
  double keep_scale;         // ... and by what it multiplies it
  int64_t heads;
  bool folded;
  bool rounded;  // bfloat16 throughout, where the processor multiplies it: what one product hands the next is rounded
  int threads;

  void* out;      // T [B, C, E]
  void* weights;  // T [B, L, heads * C] as applied
  void* soft;     // T, before dropout; only with `survivors`
  void* mass;     // T [heads, B, C], sums of `weights` over positions
  void* q;        // T [Q * C, E] projected queries
  void* keys;     // T folded: [Q, heads, C, E] queries times key weights; plain: [B, L, E] projected keys
  void* values;   // T folded: [B, heads, C, E] weighted memory; plain: [B, L, E] projected values
  void* context;  // T [B, C, E]
};

// Null: not wanted.
struct LabelAttentionBackward {
  LabelAttention forward;
  Array grad_out;            // [B, C, E]
  const void* grad_weights;  // T [B, L, heads * C], or null
  void* grad_query;          // T [Q, C, E]
  void* grad_memory;         // T [B, L, E]
  void* grad_pos;            // T [B, L, E]
  void* grad_in_weight;      // [3E, E] in the weights' dtype
  void* grad_in_bias;        // T [3E], comes with grad_in_weight
  void* grad_out_weight;     // [E, E] in the weights' dtype
};

}  // namespace sadcl
