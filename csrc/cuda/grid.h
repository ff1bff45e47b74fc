// A barrier of all blocks of a grid, which must all be resident: a cooperative launch sees to that.
#pragma once
#include "device.h"

SADCL_KERNELS_BEGIN

// One word of global memory, 0 before its first use ever. A barrier adds 2^31 to it in all: block 0 what the others
// leave, so that the highest bit turns when the last one comes, and the rest is as it was. Nothing is reset, grids of
// any size may follow each other, and a captured graph may be replayed.
SADCL_INLINE void grid_barrier(uint32_t* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t mine = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
    uint32_t before, now;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(state), "r"(mine) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(state) : "memory");
    } while (((now ^ before) & 0x80000000u) == 0);
  }
  __syncthreads();
}

// How many blocks came before this one; the last leaves the word as it was, 0.
SADCL_INLINE uint32_t draw(uint32_t* ticket) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(ticket), "r"(gridDim.x - 1)
               : "memory");
  return before;
}

SADCL_KERNELS_END
