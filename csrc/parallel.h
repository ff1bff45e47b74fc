// Threads and scratch memory. The loops themselves are `#pragma omp` in the kernel files: readable, and without
// OpenMP they are plain loops.
#pragma once
#include <cstddef>

namespace sadcl {

// How many threads to really start when `requested` are asked for. After a fork it is 1: libgomp's pool did not survive
// into the child and a parallel region there can wait forever.
int team_size(int requested);

// Number of the calling thread in its team, and the size of that team.
int thread_index();
int team_now();

bool has_openmp();

// 64-byte aligned and uninitialised. Throws std::bad_alloc, so call it outside of parallel regions.
void* scratch_alloc(size_t bytes);
void scratch_free(void* pointer);

}  // namespace sadcl
