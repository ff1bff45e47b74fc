// What tests and benchmarks ask of an instruction set: simd.h's exponential over an array, the processor's FMA peak.
#include "array.h"
#include "parallel.h"
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
void exp2_as(const Array& x, const Array& out) {
  const T* in = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(out.data);
  for (int64_t i = 0; i < x.shape[0]; ++i) to[i] = exp2<T>(splat(in[i]), Scale<T>(1))[0];
}

void exp2_array(const Array& x, const Array& out) {
  x.dtype == kF64 ? exp2_as<double>(x, out) : exp2_as<float>(x, out);
}

// Chains of x = x a + b that never leave the registers: enough of them to hide an FMA's latency.
float spin(int64_t rounds, float a, float b) {
  constexpr int kChains = kRegisters - 4;
  vec<float> x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = splat(float(c));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  }
  vec<float> total = {};
  for (int c = 0; c < kChains; ++c) total += x[c];
  return sum<float>(total);
}

double fma_peak(int threads) {
  constexpr int64_t kRounds = 1 << 20;
  const int team = team_size(threads);
  double best = 0;
  volatile float sink = 0.5f;
  for (int trial = 0; trial < 7; ++trial) {
    const double start = seconds_now();
#pragma omp parallel for num_threads(team) schedule(static)
    for (int t = 0; t < team; ++t) {
      const float result = spin(kRounds, 0.5f, 1.0f + float(t));
      if (result == -1.0f) sink = result;  // never: keeps the work alive
    }
    const double seconds = seconds_now() - start;
    const double flops = 2.0 * Simd<float>::kLanes * (kRegisters - 4) * double(kRounds) * team / seconds;
    best = flops > best ? flops : best;
  }
  (void)sink;
  return best;
}

SADCL_KERNELS_END
