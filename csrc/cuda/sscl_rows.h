// The active rows of an SSCL call in the scratch of a launch: where row i = p V + v comes from, its class, its unit
// vector.
//
// z holds x times a power of two that brings |x| into [1, 2), in x's dtype, which loses no bit; normalisation
// multiplies the products instead. All that is not z stands in planes of `room` numbers of 4 bytes.
#pragma once
#include "tiles.h"

SADCL_KERNELS_BEGIN

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kDepthStep = 32;  // rows of z are that many numbers wide, or a multiple

struct Sizes {
  int64_t images, views, classes, segments, depth;
  int64_t capacity;     // entries of `pairs`
  int64_t features[4];  // strides
  int64_t other[3];     // strides of the labels; of the upstream gradient
};

enum Plane { kOver, kScale, kAnchor, kPivot, kFactor, kFirst, kLast, kSlot, kMaximum, kPlanes };

template <class T>
struct Rows {
  T* z;
  float* planes;
  int n, room, tiles, width, views;
  bool overflowed;

  SADCL_INLINE Rows(T* z_, float* scratch, int vectors, int depth)
      : z(z_), planes(scratch), n(vectors), room((vectors + kTile - 1) / kTile * kTile),
        tiles((vectors + kTile - 1) / kTile), width(width_of(depth)), views(1), overflowed(false) {}
  SADCL_INLINE Rows(T* z_, float* scratch, const Sizes& s, int pairs)
      : z(z_), planes(scratch), room(int(s.capacity * s.views + kTile - 1) / kTile * kTile), width(width_of(s.depth)),
        views(int(s.views)), overflowed(pairs > s.capacity) {
    n = (overflowed ? int(s.capacity) : pairs) * views;
    tiles = (n + kTile - 1) / kTile;
  }
  static SADCL_INLINE int width_of(int64_t depth) { return int(depth + kDepthStep - 1) / kDepthStep * kDepthStep; }
  SADCL_INLINE float* plane(int which) const { return planes + int64_t(which) * room; }
  SADCL_INLINE int* numbers(int which) const { return reinterpret_cast<int*>(plane(which)); }
  SADCL_INLINE float* behind() const { return plane(kPlanes); }
  SADCL_INLINE bool same(int i, int j) const { return j >= numbers(kFirst)[i] && j < numbers(kLast)[i]; }
};

struct Range {
  int first, last;
};
// The segment that holds pair p.
SADCL_INLINE Range segment_of(const int* class_ptr, int segments, int p) {
  int low = 0, high = segments - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (class_ptr[middle + 1] <= p) low = middle + 1;
    else high = middle;
  }
  return {class_ptr[low], class_ptr[low + 1]};
}

// float32's power of two that brings the norm into [1, 2), where there is one.
SADCL_INLINE float scale_of(double norm) {
  const int exponent = __float_as_int(__double2float_rn(norm)) >> 23 & 255;
  return __int_as_float(min(max(254 - exponent, 1), 254) << 23);
}

// What a warp does for row i, x of `stride`: the norm, which it returns, unless that is known; its factors; z. Of a row
// of norm 0 nothing but that is used.
template <class T, bool UNIT>
SADCL_INLINE double stage_vector(const Rows<T>& rows, const T* x, int64_t stride, int D, int i, bool known,
                                 double norm) {
  if (!known) {
    double squares = 0;
    for (int d = lane(); UNIT && d < D; d += kWarp) {
      const double wide = double(widen(x[d * stride]));
      squares += wide * wide;
    }
    norm = UNIT ? sqrt(warp_sum(squares)) : 1;
  }
  const float scale = UNIT ? scale_of(norm) : 1;
  const double length = UNIT ? norm * double(scale) : 1;
  for (int d = lane(); d < rows.width; d += kWarp)
    rows.z[int64_t(i) * rows.width + d] = narrow<T>(d < D && norm != 0 ? float(widen(x[d * stride])) * scale : 0.0f);
  if (lane() == 0) {
    rows.plane(kOver)[i] = length == 0 ? 0 : float(1 / length);
    rows.plane(kScale)[i] = scale;
  }
  return norm;
}

// The same of an active row, `pair` in [B, C], and its class.
template <class T, bool UNIT>
SADCL_INLINE double stage_row(const Rows<T>& rows, const Sizes& s, const T* features, int i, int pair, Range range,
                              const double* known) {
  const int C = int(s.classes), b = pair / C, c = pair % C, v = i % rows.views;
  const T* x = features + b * s.features[0] + v * s.features[1] + c * s.features[2];
  if (lane() == 0) {
    rows.numbers(kFirst)[i] = range.first * rows.views;
    rows.numbers(kLast)[i] = range.last * rows.views;
    rows.numbers(kSlot)[i] = int((int64_t(b) * s.views + v) * C + c);
  }
  return stage_vector<T, UNIT>(rows, x, s.features[3], int(s.depth), i, known != nullptr, known ? *known : 0);
}

// s_ij in base 2. No product is fused into what comes after: the softmax hangs on differences of these very bits.
SADCL_INLINE float score(float product, float over_i, float over_j, float over_tau) {
  return __fmul_rn(__fmul_rn(product, __fmul_rn(over_i, over_j)), over_tau);
}
SADCL_INLINE float power(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Tile number `item` of those on and below the diagonal.
SADCL_INLINE void triangle(int item, int& row, int& column) {
  row = int((sqrtf(8.0f * float(item) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > item) --row;
  while ((row + 1) * (row + 2) / 2 <= item) ++row;
  column = item - row * (row + 1) / 2;
}

SADCL_KERNELS_END
