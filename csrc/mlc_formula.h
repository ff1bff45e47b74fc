// What a pair of images weighs by its counts of classes, for the kernels of a CPU (vectors of pairs) and of a GPU.
#pragma once
#include "simd.h"

SADCL_KERNELS_BEGIN

template <class T>
SADCL_INLINE vec<T> at_least_one(vec<T> x) {
  return x < T(1) ? splat(T(1)) : x;
}

// Shared classes over those that either has.
template <class T>
SADCL_INLINE vec<T> overlap_of(vec<T> both, vec<T> either) {
  return both / at_least_one<T>(either);
}

// Similarity-dissimilarity of an anchor with `own` classes and a partner with `theirs`, the shared ones included.
template <class T>
SADCL_INLINE vec<T> similarity_of(vec<T> both, vec<T> own, vec<T> theirs) {
  return both / (at_least_one<T>(own) * (T(1) + theirs - both));
}

SADCL_KERNELS_END
