#include "parallel.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
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

constexpr size_t kHugePage = size_t(2) << 20;

void advise([[maybe_unused]] void* pointer, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  madvise(pointer, bytes, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
}

}  // namespace

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

int team_size([[maybe_unused]] int requested) {
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

int team_now() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void* scratch_alloc(size_t bytes) {
  // Large blocks come fresh from the system: with huge pages they cost 512 times fewer page faults and the kernels'
  // panels fewer TLB misses.
  constexpr size_t kLine = 64;
  const size_t align = bytes >= 2 * kHugePage ? kHugePage : kLine;
  const size_t size = (bytes + align) / align * align;
  void* pointer = std::aligned_alloc(align, size);
  if (pointer == nullptr) throw std::bad_alloc();
  if (align == kHugePage) advise(pointer, size);
  return pointer;
}

void want_huge_pages(void* pointer, size_t bytes) {
  if (bytes < 2 * kHugePage) return;
  const size_t skip = -reinterpret_cast<uintptr_t>(pointer) & (kHugePage - 1);
  advise(static_cast<char*>(pointer) + skip, (bytes - skip) / kHugePage * kHugePage);
}

void scratch_free(void* pointer) { std::free(pointer); }

}  // namespace sadcl
