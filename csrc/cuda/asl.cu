// Asymmetric loss and its derivative, one launch each way.
//
// Forward: a block an image, or one for the sum of few. Threads walk over the classes; nearly all labels are 0, for
// which half the formula does. At B = 32, C = 80 a thread has one element: the launch is the cost.
//
// Defines: LOGITS, LABELS (types); WEIGHTED (by class), CLIP, SAVE (0 or 1), SUM (0: of
// nothing, 1: an image's classes, 2: all, by one block). Of the backward: LOGITS.
#include "asl_formula.h"
#include "device.h"

SADCL_KERNELS_BEGIN
using A = Accumulation<LOGITS>::type;

#ifdef KERNEL_asl_forward
constexpr int kThreads = SUM == 2 ? 1024 : 128;

struct Strides {
  int64_t logits[2], labels[2], weight;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    asl_forward(const LOGITS* logits, const LABELS* labels, const A* weight, A* loss, A* slope, int64_t B, int64_t C,
                Strides stride, double gamma_neg, double gamma_pos, double clip, double log_eps, int64_t detach) {
  const Focus<A> focus(gamma_neg, gamma_pos, clip, log_eps, detach != 0);
  const int64_t first = SUM == 2 ? 0 : int64_t(blockIdx.x) * C, last = SUM == 2 ? B * C : first + C;
  double total = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const int64_t b = SUM == 2 ? i / C : blockIdx.x, c = i - b * C;
    const A y = A(widen(labels[b * stride.labels[0] + c * stride.labels[1]]));
    Element<A> e = {0, 0};
    if (y != A(-1)) {
      const A x = A(widen(logits[b * stride.logits[0] + c * stride.logits[1]]));
      e = y == A(0) ? all_negative<A, CLIP>(x, focus) : any_label<A, CLIP>(x, y, focus);
      if (WEIGHTED) {
        const A w = weight[c * stride.weight];
        e.loss *= w, e.grad *= w;
      }
    }
    if (SAVE) slope[i] = e.grad;
    if (SUM == 0) loss[i] = e.loss;
    total += double(e.loss);
  }
  if (SUM != 0) {
    total = block_sum<kThreads>(total, reinterpret_cast<double*>(shared_memory));
    if (threadIdx.x == 0) loss[blockIdx.x] = A(total);
  }
}
#endif

#ifdef KERNEL_asl_backward
constexpr int kThreads = 256;

struct Strides {
  int64_t upstream[2];
};

// grad = upstream slope; the upstream may be expanded (stride 0) over images or classes.
extern "C" __global__ void __launch_bounds__(kThreads)
    asl_backward(const A* upstream, const A* slope, LOGITS* grad, int64_t C, int64_t count, Strides stride) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const A u = upstream[i / C * stride.upstream[0] + i % C * stride.upstream[1]];
  grad[i] = narrow<LOGITS>(u * slope[i]);
}
#endif

SADCL_KERNELS_END
