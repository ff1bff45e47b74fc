// Scratch memory that frees itself, and zero-filling by all threads.
#pragma once
#include <string.h>

#include "isa.h"
#include "parallel.h"

SADCL_KERNELS_BEGIN

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(scratch_alloc(size_t(count) * sizeof(T)))) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline void zero_fill(void* data, int64_t bytes, int threads) {
  constexpr int64_t kChunk = 1 << 18;
  char* p = static_cast<char*>(data);
  if (bytes <= kChunk) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < (bytes + kChunk - 1) / kChunk; ++i)
    memset(p + i * kChunk, 0, size_t(bytes - i * kChunk < kChunk ? bytes - i * kChunk : kChunk));
}

SADCL_KERNELS_END
