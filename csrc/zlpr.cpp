// ZLPR: log(1 + sum of e^x over negatives) + log(1 + sum of e^-x over positives) of every image; compiled once per
// instruction set. A row goes through the cache in chunks, once forward and once backward.
#include "zlpr.h"

#include "log_sums.h"
#include "scratch.h"

SADCL_KERNELS_BEGIN
namespace {

constexpr int64_t kChunk = 1024;

template <class T>
bool forward(const ZlprForward& a) {
  const int64_t B = a.logits.shape[0], C = a.logits.shape[1];
  [[maybe_unused]] const int threads = B * C < 1 << 13 ? 1 : team_size(a.threads);
  bool bad = false;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : bad)
  for (int64_t b = 0; b < B; ++b) {
    alignas(64) T negative[kChunk], positive[kChunk];
    LogSum<T> no, yes;
    no.add(T(0), 1.0), yes.add(T(0), 1.0);
    for (int64_t c = 0; c < C; c += kChunk) {
      const int64_t n = C - c < kChunk ? C - c : kChunk;
      bad = !part_row(a.logits, a.labels, b, c, n, negative, positive) || bad;
      no.add(negative, n), yes.add(positive, n);
    }
    a.lse[b] = no.value(), a.lse[B + b] = yes.value();
    static_cast<T*>(a.row_loss)[b] = T(a.lse[b] + a.lse[B + b]);
  }
  return !bad;
}

template <class T>
void backward(const ZlprBackward& a) {
  const Array& out = a.grad_logits;
  const int64_t B = out.shape[0], C = out.shape[1];
  [[maybe_unused]] const int threads = B * C < 1 << 13 ? 1 : team_size(a.threads);
  want_huge_pages(out.data, size_t(B * C * element_size(out.dtype)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < B; ++b) {
    constexpr int L = Simd<T>::kLanes;
    alignas(64) T negative[kChunk], positive[kChunk];
    const double upstream = static_cast<const T*>(a.grad_rows.data)[b * a.grad_rows.stride[0]];
    const Shift<T> no(a.lse[b], upstream), yes(a.lse[B + b], upstream);
    for (int64_t c = 0; c < C; c += kChunk) {
      const int64_t n = C - c < kChunk ? C - c : kChunk;
      part_row(a.logits, a.labels, b, c, n, negative, positive);
      for (int64_t i = n; i % L != 0; ++i) negative[i] = positive[i] = 0;
      for (int64_t i = 0; i < n; i += L) {
        const vec<T> x = load(negative + i), y = load(positive + i);
        store(negative + i, exp<T>(x - no.high) * no.factor - exp<T>(y - yes.high) * yes.factor);
      }
      write_row(out.data, out.dtype, b * C + c, n, negative);
    }
  }
}

}  // namespace

bool zlpr_forward(const ZlprForward& args) { return SADCL_BY_DTYPE(zlpr_forward, forward, args.logits.dtype, args); }

void zlpr_backward(const ZlprBackward& args) { SADCL_BY_DTYPE(zlpr_backward, backward, args.logits.dtype, args); }

SADCL_KERNELS_END
