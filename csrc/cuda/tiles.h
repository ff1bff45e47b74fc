// Products of staged rows, 32 by 32: tensor cores for 16-bit rows, fused multiply-adds for float32.
//
// A block of 8 warps shares a tile by depth: where rows are few there are few tiles, and what a tile takes is the time
// of its loads, which are then all under way at once. Operands go from global memory (L2) to registers, 16 bytes at a
// time; the order of the depth within 32 is free, so a thread's 16 bytes are the fragments of two steps of mma.
#pragma once
#include "device.h"

SADCL_KERNELS_BEGIN

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32, kPitch = kTile + 1;  // a row of the tile in shared memory; odd: columns don't share a bank
constexpr int kTileBytes = kWarps * kTile * kPitch * 4;

SADCL_INLINE float* tile_memory() { return reinterpret_cast<float*>(shared_memory); }
SADCL_INLINE int first_row_of_warp() { return int(blockIdx.x) * kWarps + warp(); }
SADCL_INLINE int all_warps() { return int(gridDim.x) * kWarps; }
SADCL_INLINE int64_t thread_of_grid() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
SADCL_INLINE int64_t all_threads() { return int64_t(gridDim.x) * kThreads; }

struct alignas(16) Four {
  uint32_t x, y, z, w;
};
struct alignas(16) Floats {
  float x, y, z, w;
};

SADCL_INLINE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                           bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
SADCL_INLINE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                           f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Rows [row0, row0 + 32) of z [n][width] times rows [col0, col0 + 32), width a multiple of 32: this warp's share of the
// depth, into `part` [32][kPitch]. Rows beyond n repeat the last one.
template <class T>
SADCL_INLINE void share_of_tile(const T* z, int width, int n, int row0, int col0, float* part) {
  const int g = lane() / 4, t = lane() % 4;
  float c[2][4][4] = {};
  for (int k = warp() * 32; k < width; k += kWarps * 32) {
    Four a[4], b[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      a[q] = *reinterpret_cast<const Four*>(z + int64_t(min(row0 + q * 8 + g, n - 1)) * width + k + t * 8);
      b[q] = *reinterpret_cast<const Four*>(z + int64_t(min(col0 + q * 8 + g, n - 1)) * width + k + t * 8);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        multiply(c[m][q], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b[q].x, b[q].y, T());
        multiply(c[m][q], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b[q].z, b[q].w, T());
      }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) part[(m * 16 + g + i / 2 * 8) * kPitch + q * 8 + t * 2 + i % 2] = c[m][q][i];
}
template <>
SADCL_INLINE void share_of_tile<float>(const float* z, int width, int n, int row0, int col0, float* part) {
  const int g = lane() / 4, t = lane() % 4;
  float c[4][8] = {};
  for (int k0 = warp() * 32; k0 < width; k0 += kWarps * 32)
    for (int k = k0; k < k0 + 32; k += 4) {
      Floats a[4], b[8];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        a[q] = *reinterpret_cast<const Floats*>(z + int64_t(min(row0 + q * 8 + g, n - 1)) * width + k);
#pragma unroll
      for (int q = 0; q < 8; ++q)
        b[q] = *reinterpret_cast<const Floats*>(z + int64_t(min(col0 + q * 4 + t, n - 1)) * width + k);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          c[r][q] = __fmaf_rn(a[r].x, b[q].x, c[r][q]);
          c[r][q] = __fmaf_rn(a[r].y, b[q].y, c[r][q]);
          c[r][q] = __fmaf_rn(a[r].z, b[q].z, c[r][q]);
          c[r][q] = __fmaf_rn(a[r].w, b[q].w, c[r][q]);
        }
    }
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int q = 0; q < 8; ++q) part[(r * 8 + g) * kPitch + q * 4 + t] = c[r][q];
}

// The tile, in `shared` [32][kPitch] for all threads; kTileBytes of it are overwritten, a barrier stands at both ends.
template <class T>
SADCL_INLINE void tile_of_products(const T* z, int width, int n, int row0, int col0, float* shared) {
  __syncthreads();
  share_of_tile<T>(z, width, n, row0, col0, shared + warp() * kTile * kPitch);
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kTile * kTile / kThreads; ++q) {
    const int e = int(threadIdx.x) + q * kThreads, at = e / kTile * kPitch + e % kTile;
    float total = shared[at];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += shared[w * kTile * kPitch + at];
    shared[at] = total;
  }
  __syncthreads();
}

constexpr int kSlice = 64, kSlicePitch = kSlice + 8;  // of the width; rows of 16 bits in shared memory, apart in banks
constexpr int kSums = 8;                              // of a thread

// Where a thread's sum number e of weighted_rows stands: row within 32, column within 64.
template <class T>
struct SumsOf {
  SADCL_INLINE static int row(int e) { return warp() % 2 * 16 + lane() / 4 + e / 2 % 2 * 8; }
  SADCL_INLINE static int column(int e) { return warp() / 2 * 16 + e / 4 * 8 + lane() % 4 * 2 + e % 2; }
};
template <>
struct SumsOf<float> {
  SADCL_INLINE static int row(int e) { return warp() * 4 + e / 2; }
  SADCL_INLINE static int column(int e) { return lane() * 2 + e % 2; }
};

// sums: rows of weight [32][pitch] times columns [d0, d0 + 64) of z [n][width], pitch a multiple of 32 and >= n,
// weights 0 beyond n. 16-bit rows pass through `shared` [64][kSlicePitch], permuted so that a thread's 16 bytes of
// weights are the fragments of two steps.
template <class T>
SADCL_INLINE void weighted_rows(const T* weight, int pitch, const T* z, int width, int n, int d0, void* scratch,
                                float (&sums)[kSums]) {
  T* shared = static_cast<T*>(scratch);
  const int g = lane() / 4, t = lane() % 4, m = warp() % 2 * 16, column = warp() / 2 * 16;
  const int d = d0 + int(threadIdx.x) % 8 * 8;
  float c[2][4] = {};
  Four next[2];
  auto fetch = [&](int j0) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int j = j0 + q * 32 + int(threadIdx.x) / 8;
      next[q] = j < n && d < width ? *reinterpret_cast<const Four*>(z + int64_t(j) * width + d) : Four{0, 0, 0, 0};
    }
  };
  fetch(0);
  for (int j0 = 0; j0 < pitch; j0 += 64) {
    __syncthreads();
    const int j = int(threadIdx.x) / 8, place = j % 8 / 4 * 16 + j % 4 / 2 * 8 + j / 8 * 2 + j % 2;
#pragma unroll
    for (int q = 0; q < 2; ++q)
      *reinterpret_cast<Four*>(shared + (q * 32 + place) * kSlicePitch + int(threadIdx.x) % 8 * 8) = next[q];
    __syncthreads();
    fetch(j0 + 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = j0 + half * 32;
      if (k >= pitch) break;
      const Four a0 = *reinterpret_cast<const Four*>(weight + int64_t(m + g) * pitch + k + t * 8);
      const Four a1 = *reinterpret_cast<const Four*>(weight + int64_t(m + g + 8) * pitch + k + t * 8);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const T* from = shared + (half * 32 + step * 16 + lane() % 16) * kSlicePitch + column + lane() / 16 * 8;
        uint32_t b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(uint32_t(__cvta_generic_to_shared(from)))
                     : "memory");
#pragma unroll
        for (int q = 0; q < 2; ++q)
          multiply(c[q], step ? a0.z : a0.x, step ? a1.z : a1.x, step ? a0.w : a0.y, step ? a1.w : a1.y, b[2 * q],
                   b[2 * q + 1], T());
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kSums; ++e) sums[e] = c[e / 4][e % 4];
}
template <>
SADCL_INLINE void weighted_rows<float>(const float* weight, int pitch, const float* z, int width, int n, int d0, void*,
                                       float (&sums)[kSums]) {
  const int d = min(d0 + lane() * 2, width - 2);
  weight += int64_t(warp()) * 4 * pitch;
#pragma unroll
  for (int e = 0; e < kSums; ++e) sums[e] = 0;
  for (int j = 0; j < pitch; j += 4) {
    Floats w[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) w[r] = *reinterpret_cast<const Floats*>(weight + int64_t(r) * pitch + j);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float* from = z + int64_t(min(j + q, n - 1)) * width + d;
      const float z0 = from[0], z1 = from[1];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float by = q == 0 ? w[r].x : q == 1 ? w[r].y : q == 2 ? w[r].z : w[r].w;
        sums[2 * r] = __fmaf_rn(by, z0, sums[2 * r]);
        sums[2 * r + 1] = __fmaf_rn(by, z1, sums[2 * r + 1]);
      }
    }
  }
}

SADCL_KERNELS_END
