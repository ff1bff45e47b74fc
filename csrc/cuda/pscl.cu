// Prototype-to-sample contrastive loss, one launch each way, without atomics on numbers.
//
// Forward: a block a class. A warp takes an image's row at a time (dot product and norm in float64, as csrc/pscl.cpp);
// then the first warp makes the log-sum-exps of the class's scores. Backward: a block a class and a slice of the width,
// and one more block for the temperature, which sums over all scores and needs no other block.
// At B = 32, C = 80, D = 1024 in bfloat16 5 MB are read, 1.6 us on an H100: below what a launch costs.
//
// Defines: FEATURES (type, of the prototypes too), PACK (elements of a load; above 1 rows are contiguous and aligned to
// it), RELEASED, MEAN (1: of op dual_mean, see there).
#include "grid.h"
#include "pscl_formula.h"

SADCL_KERNELS_BEGIN
using X = FEATURES;
using A = Accumulation<X>::type;

struct Strides {
  int64_t b, c, d, prototype_c, prototype_d;
};

struct alignas(PACK * sizeof(X)) Pack {
  X at[PACK];
};
SADCL_INLINE Pack load(const X* row, int64_t d, int64_t stride) {
  if (PACK > 1) return *reinterpret_cast<const Pack*>(row + d);
  Pack one;
  one.at[0] = row[d * stride];
  return one;
}

#ifdef KERNEL_pscl_forward
constexpr int kThreads = 512, kWarps = kThreads / kWarp;

struct LogSum {
  double highest, value;
};
// Log-sum-exp of a warp's part of `count` scores, those whose target is `least` or more, and the highest of them.
SADCL_INLINE LogSum log_sum_exp(const double* score, const int8_t* target, int64_t count, int64_t stride, int least) {
  LogSum out = {-infinity(), -infinity()};
  bool found = false;
  for (int64_t b = lane(); b < count; b += kWarp) {
    if (target[b * stride] < least) continue;
    const double s = score[b * stride];
    found = true;
    out.highest = s > out.highest ? s : out.highest;
  }
  out.highest = warp_max(out.highest);
  double total = 0;
  for (int64_t b = lane(); b < count; b += kWarp)
    if (target[b * stride] >= least) total += exp<double>(score[b * stride] - out.highest);
  total = warp_sum(total);
  if (warp_max(int(found)) != 0) out.value = out.highest + ::log(total);
  return out;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    pscl_forward(const X* features, const X* prototypes, const int8_t* target, const A* temperature, A* class_loss,
                 double* score, double* norm_x, double* norm_p, double* lse, int64_t B, int64_t C, int64_t D,
                 Strides stride
#if MEAN
                 ,
                 const int32_t* class_ptr, const A* row_loss, int64_t views, A* sample, A* prototype, A* over_rows,
                 uint32_t* ticket
#endif
    ) {
  const int64_t c = blockIdx.x;
  const double tau = double(temperature[0]);
  const X* p = prototypes + c * stride.prototype_c;
  double own = 0;
  for (int64_t d = int64_t(threadIdx.x) * PACK; d < D; d += kThreads * PACK) {
    const Pack q = load(p, d, stride.prototype_d);
#pragma unroll
    for (int k = 0; k < PACK; ++k) own += double(widen(q.at[k])) * double(widen(q.at[k]));
  }
  own = sqrt(block_sum<kThreads>(own, reinterpret_cast<double*>(shared_memory)));
  if (threadIdx.x == 0) norm_p[c] = own;

  for (int64_t b = warp(); b < B; b += kWarps) {
    double dot = 0, square = 0;
    if (target[b * C + c] != -1) {  // what an ignored place holds is never read
      const X* x = features + b * stride.b + c * stride.c;
#pragma unroll 4
      for (int64_t d = lane() * PACK; d < D; d += kWarp * PACK) {
        const Pack v = load(x, d, stride.d), q = load(p, d, stride.prototype_d);
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
          const double wide = double(widen(v.at[k]));
          dot += wide * double(widen(q.at[k]));
          square += wide * wide;
        }
      }
    }
    dot = warp_sum(dot), square = warp_sum(square);
    if (lane() == 0) {
      const double norm = sqrt(square);
      norm_x[b * C + c] = norm;
      score[b * C + c] = pscl_score(dot, norm, own, tau);
    }
  }
  __syncthreads();
  if (warp() == 0) {
    const LogSum all = log_sum_exp(score + c, target + c, B, C, 0);
    const LogSum some = log_sum_exp(score + c, target + c, B, C, 1);
    if (lane() == 0) {
      lse[c] = all.value, lse[C + c] = some.value;
      class_loss[c] = A(pscl_class_loss(all.value, some.value, all.highest, some.value != -infinity(),
                                        all.value != -infinity(), RELEASED));
    }
  }
#if MEAN  // The block that comes last adds up this loss, and SSCL's, which an earlier launch left.
  double* shared = reinterpret_cast<double*>(shared_memory);
  if (threadIdx.x == 0) shared[kWarps] = draw(ticket) == gridDim.x - 1;
  __syncthreads();
  if (shared[kWarps] == 0) return;
  double rows = 0, classes = 0;
  for (int64_t i = threadIdx.x; i < B * views * C; i += kThreads) rows += double(row_loss[i]);
  for (int64_t i = threadIdx.x; i < C; i += kThreads) classes += double(class_loss[i]);
  rows = block_sum<kThreads>(rows, shared), classes = block_sum<kThreads>(classes, shared);
  if (threadIdx.x == 0) {
    const int64_t count = class_ptr[C] > 1 ? class_ptr[C] : 1;
    const int64_t all = class_ptr[C] * views > 1 ? class_ptr[C] * views : 1;
    sample[0] = A(rows / double(all)), prototype[0] = A(classes / double(count)), over_rows[0] = A(1 / double(all));
  }
#endif
}
#endif

#ifdef KERNEL_pscl_backward
constexpr int kThreads = 128, kImages = 128;  // images whose factors are kept at a time

struct Rows {  // strides of the gradient's rows; with MEAN it is added to what is there: SSCL's
  int64_t b, c;
};

SADCL_INLINE bool is_active(double some) { return RELEASED || some != -infinity(); }
SADCL_INLINE double grad_score(double score, int8_t target, double all, double some, double upstream) {
  return upstream * (exp<double>(score - all) - (target == 1 ? exp<double>(score - some) : 0));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    pscl_backward(const A* upstream, int64_t stride_g, const X* features, const X* prototypes, const int8_t* target,
                  const A* temperature, const double* score, const double* norm_x, const double* norm_p,
                  const double* lse, X* grad_features, X* grad_prototypes, A* grad_temperature, int64_t B, int64_t C,
                  int64_t D, Strides stride
#if MEAN
                  ,
                  const int32_t* class_ptr, Rows rows
#endif
    ) {
  const double tau = double(temperature[0]);
#if MEAN  // upstream is of the mean, and may be missing
  const int64_t count = class_ptr[C] > 1 ? class_ptr[C] : 1;
  const double mean = upstream == nullptr ? 0 : double(upstream[0]) / double(count);
#define UPSTREAM(c) mean
#else
#define UPSTREAM(c) double(upstream[(c) * stride_g])
  const Rows rows = {C * D, D};
#endif
  double* shared = reinterpret_cast<double*>(shared_memory);
  if (blockIdx.x == gridDim.x - 1) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < B * C; i += kThreads) {
      const int64_t c = i % C;
      if (target[i] == -1 || !is_active(lse[C + c])) continue;
      total += grad_score(score[i], target[i], lse[c], lse[C + c], UPSTREAM(c)) * score[i];
    }
    total = block_sum<kThreads>(total, shared);
    if (threadIdx.x == 0) grad_temperature[0] = A(-total / tau);
    return;
  }
  const int64_t c = blockIdx.x % C, d = (int64_t(blockIdx.x / C) * kThreads + threadIdx.x) * PACK;
  const double all = lse[c], some = lse[C + c], norm = norm_p[c], u = UPSTREAM(c);
  double *along = shared + kThreads / kWarp, *across = along + kImages;
  Pack q;
  double total[PACK] = {};
  if (d < D) q = load(prototypes + c * stride.prototype_c, d, stride.prototype_d);
  double cosines = 0;
  for (int64_t first = 0; first < B; first += kImages) {
    const int64_t b = first + threadIdx.x, i = b * C + c;
    if (b < B) {
      PsclFactors f = {0, 0, 0, 0};
      if (target[i] != -1 && is_active(some))
        f = pscl_factors(grad_score(score[i], target[i], all, some, u), score[i], norm_x[i], norm, tau, D);
      cosines += f.cosines;
      along[threadIdx.x] = f.along, across[threadIdx.x] = f.across;
    }
    __syncthreads();
    const int count = int(B - first < kImages ? B - first : kImages);
    if (d < D) {
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const double a = along[k], x = across[k];
        Pack out;
        const bool read = a != 0 || x != 0;  // NaN is not 0
        const X* row = features + (first + k) * stride.b + c * stride.c;
        const Pack v = read ? load(row, d, stride.d) : Pack{};
        X* to = grad_features + (first + k) * rows.b + c * rows.c + d;
        const Pack there = MEAN ? load(to, 0, 1) : Pack{};
#pragma unroll
        for (int j = 0; j < PACK; ++j) {
          const double wide = double(widen(v.at[j]));
          const double made = a * double(widen(q.at[j])) + x * wide;
          out.at[j] = narrow<X>(MEAN ? made + double(widen(there.at[j])) : made);
          total[j] += a * wide;
        }
        if (PACK > 1) {
          *reinterpret_cast<Pack*>(to) = out;
        } else {
          *to = out.at[0];
        }
      }
    }
    __syncthreads();
  }
  const double own = pscl_own(block_sum<kThreads>(cosines, shared), norm);
  if (d >= D) return;
#pragma unroll
  for (int j = 0; j < PACK; ++j) grad_prototypes[c * D + d + j] = narrow<X>(own * double(widen(q.at[j])) + total[j]);
}
#endif

SADCL_KERNELS_END
