// Arguments of the memory-bank update.
#pragma once
#include "array.h"

namespace sadcl {

struct BankUpdate {
  Array slots;     // [B_slot, C, E], written: contiguous rows
  Array features;  // [B, C, E], B <= B_slot; float64 only with float64 slots
  Array scores;    // [B, C] float32 or float64
  Array labels;    // [B, C], any real dtype
  double threshold;
  bool probabilities;  // scores are probabilities, not logits
  int threads;
};
void bank_update(const BankUpdate& args);

}  // namespace sadcl
