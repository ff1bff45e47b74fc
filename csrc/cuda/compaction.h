// Labels [B, C] to class-major pairs, by every block for itself: so many labels are read sooner than a grid meets.
#pragma once
#include "tiles.h"

SADCL_KERNELS_BEGIN

struct Compacted {
  int* starts;  // [C + 1]: class c owns pairs[starts[c] ... starts[c + 1])
  int* pairs;   // of which `capacity` were kept
  int count;
};

// `shared` has room for C + 1 + max(C, kThreads) + capacity ints.
template <class L>
SADCL_INLINE Compacted compacted(const L* labels, const int64_t* stride, int B, int C, int capacity, int* shared) {
  const int chunks = max(1, kThreads / max(C, 1)), per = (B + chunks - 1) / chunks, units = C * chunks;
  int *starts = shared, *counts = shared + C + 1, *pairs = counts + max(C, kThreads);
  // A unit is a class and a chunk of images: neighbours in memory are neighbouring classes.
  for (int t = int(threadIdx.x); t < units; t += kThreads) {
    const int c = t % C, chunk = t / C;
    int count = 0;
    for (int b = chunk * per; b < min(B, (chunk + 1) * per); ++b)
      count += target_of(labels[b * stride[0] + c * stride[1]]) == 1;
    counts[c * chunks + chunk] = count;
  }
  __syncthreads();
  if (warp() == 0) {
    int total = 0;
    for (int first = 0; first < units; first += kWarp) {
      const int u = first + lane(), mine = u < units ? counts[u] : 0;
      int sum = mine;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int left = __shfl_up_sync(kAll, sum, step);
        if (lane() >= step) sum += left;
      }
      if (u < units) {
        counts[u] = total + sum - mine;
        if (u % chunks == 0) starts[u / chunks] = total + sum - mine;
      }
      total += __shfl_sync(kAll, sum, kWarp - 1);
    }
    if (lane() == 0) starts[C] = total;
  }
  __syncthreads();
  for (int t = int(threadIdx.x); t < units; t += kThreads) {
    const int c = t % C, chunk = t / C;
    int slot = counts[c * chunks + chunk];
    for (int b = chunk * per; b < min(B, (chunk + 1) * per); ++b)
      if (target_of(labels[b * stride[0] + c * stride[1]]) == 1) {
        if (slot < capacity) pairs[slot] = b * C + c;
        ++slot;
      }
  }
  __syncthreads();
  return {starts, pairs, starts[C]};
}

SADCL_KERNELS_END
