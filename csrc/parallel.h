// Threads, scratch memory and the clock. The loops themselves are `#pragma omp` in the kernel files: readable, and
// without OpenMP they are plain loops.
#pragma once
#include <stddef.h>

namespace sadcl {

// How many threads to really start when `requested` are asked for. After a fork it is 1: libgomp's pool did not survive
// into the child and a parallel region there can wait forever.
int team_size(int requested);

// Number of the calling thread in its team, and the size of that team.
int thread_index();
int team_now();

bool has_openmp();

// Of a clock that never jumps. Here because <chrono> must not be seen by per-ISA files (isa.h).
double seconds_now();

// 64-byte aligned and uninitialised. Throws std::bad_alloc, so call it outside of parallel regions.
void* scratch_alloc(size_t bytes);
void scratch_free(void* pointer);

// Asks for huge pages under an output that is about to be written, if it has 4 MB or more (numpy does the same for its
// arrays). Allocators often take memory of this size fresh from the system; in 4 KB pages that is a page fault for
// each, half a second a GB on a virtual machine.
void want_huge_pages(void* pointer, size_t bytes);

}  // namespace sadcl
