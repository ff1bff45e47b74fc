// Labels to class-major pairs and class pointers, in one block: what a COCO batch has (2,560 labels) is read in a
// microsecond, and a second launch would cost as much as all of it.
//
// A warp takes a class at a time; the order of the pairs is the specified one, class, then image. class_ptr holds the
// counts until they are summed.
//
// Defines: LABELS (type).
#include "device.h"

SADCL_KERNELS_BEGIN

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;

struct Strides {
  int64_t b, c;
};

extern "C" __global__ void __launch_bounds__(kThreads) compact(const LABELS* labels, int32_t* pairs, int32_t* class_ptr,
                                                               int8_t* target, int64_t B, int64_t C, Strides stride) {
  for (int64_t c = warp(); c < C; c += kWarps) {
    int count = 0;
    for (int64_t first = 0; first < B; first += kWarp) {
      const int64_t b = first + lane();
      const int t = b < B ? target_of(labels[b * stride.b + c * stride.c]) : 0;
      if (b < B) target[b * C + c] = int8_t(t);
      count += __popc(__ballot_sync(kAll, t == 1));
    }
    if (lane() == 0) class_ptr[c + 1] = count;
  }
  __syncthreads();

  int* sums = reinterpret_cast<int*>(shared_memory);  // of each warp's 32 classes
  int before = 0;
  for (int64_t first = 0; first < C; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    int end = c < C ? class_ptr[c + 1] : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAll, end, step);
      if (lane() >= step) end += other;
    }
    if (lane() == kWarp - 1) sums[warp()] = end;
    __syncthreads();
    int base = before, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      base += w < warp() ? sums[w] : 0;
      all += sums[w];
    }
    if (c < C) class_ptr[c + 1] = base + end;
    before += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) class_ptr[0] = 0;
  __syncthreads();

  for (int64_t c = warp(); c < C; c += kWarps) {
    int slot = class_ptr[c];
    for (int64_t first = 0; first < B; first += kWarp) {
      const int64_t b = first + lane();
      const bool active = b < B && target[b * C + c] == 1;
      const uint32_t found = __ballot_sync(kAll, active);
      if (active) pairs[slot + __popc(found & ((1u << lane()) - 1))] = int32_t(b * C + c);
      slot += __popc(found);
    }
  }
  for (int64_t i = before + int64_t(threadIdx.x); i < B * C; i += kThreads) pairs[i] = 0;
}

SADCL_KERNELS_END
