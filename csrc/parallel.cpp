#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sadcl {
namespace {

std::atomic<bool> in_forked_child{false};

#if !defined(_WIN32)
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

int team_size(int requested) {
#if defined(_OPENMP)
  return (requested < 1 || in_forked_child) ? 1 : requested;
#else
  return 1;
#endif
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void* scratch_alloc(size_t bytes) {
  constexpr size_t kAlign = 64;
  void* pointer = std::aligned_alloc(kAlign, (bytes + kAlign) / kAlign * kAlign);
  if (pointer == nullptr) throw std::bad_alloc();
  return pointer;
}

void scratch_free(void* pointer) { std::free(pointer); }

}  // namespace sadcl
