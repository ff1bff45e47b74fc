// The active rows of an SSCL call: where they live in `features`, and their unit vectors as panels (panels.h).
#pragma once
#include <float.h>
#include <math.h>

#include "pairs.h"
#include "sscl.h"

SADCL_KERNELS_BEGIN

struct Place {
  int64_t image, view, label;
};

// Rows [first, last) of a class.
struct Range {
  int64_t first, last;
};

template <class T>
struct Rows {
  static constexpr int P = Tile<T>::P;

  const SsclRows& in;
  int64_t V, C, D;
  int64_t n;       // active rows
  int64_t depth;   // D rounded up to the register tile; the rest is zero
  int64_t panels;  // ceil(n / P)
  int threads;
  Scratch<int32_t> classes;  // [n] class of each row
  Scratch<T> z;              // [panels][depth][P]
  double bound;              // |s_ij| <= bound; NaN if a row is not finite

  // In place of z, where bfloat16 rows are multiplied as such: the rows times a power of two, which takes no digit from
  // them, and what a score has to be multiplied by for each of its two rows. For scores `pairs`; for the gradient
  // `row_pairs` too.
  enum Use { kUnits, kScores, kGradient };
  bool paired, gradient;
  int64_t pair_depth;
  Scratch<Pair> pairs;      // [panels][pair_depth][P], of neighbours in depth
  Scratch<Pair> row_pairs;  // [panels][depth][P / 2], of neighbouring rows
  Scratch<T> remainder;     // [panels * P]

  explicit Rows(const SsclRows& r, Use use)
      : in(r), V(r.features.shape[1]), C(r.features.shape[2]), D(r.features.shape[3]),
        n(V * r.class_ptr[r.num_classes]), depth(rounded_up(D)), panels((n + P - 1) / P), threads(team_size(r.threads)),
        classes(n + 1), z(!takes_pairs(r, use) ? panels * depth * P + 1 : 1), bound(0), paired(takes_pairs(r, use)),
        gradient(use == kGradient), pair_depth(rounded_up((D + 1) / 2)),
        pairs(paired ? panels * pair_depth * P + 1 : 1),
        row_pairs(paired && use == kGradient ? panels * depth * (P / 2) + 1 : 1),
        remainder(paired ? panels * P + 1 : 1) {
    // Below some hundred thousand multiply-adds waking the team costs more than it brings.
    if (double(n) * double(n) * double(depth) < 5e5) threads = 1;
    for (int64_t c = 0; c < r.num_classes; ++c) {
      const Range range = rows_of(c);
      for (int64_t i = range.first; i < range.last; ++i) classes[i] = int32_t(c);
    }
  }

  // Products of scores are exact, those of the gradient have rounded weights.
  static bool takes_pairs(const SsclRows& r, Use use) {
    const bool wanted = use == kScores ? r.normalize || r.rounded : use == kGradient && r.rounded;
    return kHasPairs && sizeof(T) == 4 && wanted && r.features.dtype == kBF16;
  }

  // To the register tile, and at least one: a score of nothing is 0.
  static int64_t rounded_up(int64_t d) {
    constexpr int kMR = Tile<T>::kMR;
    return d == 0 ? kMR : (d + kMR - 1) / kMR * kMR;
  }

  Range rows_of(int64_t c) const { return {in.class_ptr[c] * V, in.class_ptr[c + 1] * V}; }

  Place place(int64_t i) const {
    const int64_t pair = in.pairs[i / V];
    return {pair / C, i % V, pair % C};
  }
  int64_t offset(const Place& p, const Array& a) const {
    return p.image * a.stride[0] + p.view * a.stride[1] + p.label * a.stride[2];
  }
  // Row number in a contiguous [B, V, C].
  int64_t flat(const Place& p) const { return (p.image * V + p.view) * C + p.label; }
  T* panel(int64_t p) { return z.get() + p * depth * P; }
  Pair* pair_panel(int64_t p) { return pairs.get() + p * pair_depth * P; }
  Pair* row_pair_panel(int64_t p) { return row_pairs.get() + p * depth * (P / 2); }
  // Numbers d of panel p's rows, in z or put into `made`.
  SADCL_INLINE const T* numbers(int64_t p, int64_t d, T (&made)[P]) {
    if (!paired) return panel(p) + d * P;
    const Pair* two = row_pair_panel(p) + d * (P / 2);
    for (int q = 0; q < P / 2; ++q) {
      made[2 * q] = T(from_bits(two[q].bits << 16)) * remainder[p * P + 2 * q];
      made[2 * q + 1] = T(from_bits(two[q].bits & 0xffff0000u)) * remainder[p * P + 2 * q + 1];
    }
    return made;
  }
};

// Sum of squares in float64, where neither 1e30 nor the smallest subnormal of float32 can do harm.
template <class T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int kParts = 16;
  double part[kParts] = {};
  int64_t d = 0;
  for (; d + kParts <= n; d += kParts)
    for (int i = 0; i < kParts; ++i) part[i] += double(x[d + i]) * double(x[d + i]);
  for (; d < n; ++d) part[0] += double(x[d]) * double(x[d]);
  for (int step = kParts / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
}

// |x|, also where float64 features overflow or underflow when squared.
template <class T>
double length(const T* x, int64_t n) {
  const double squares = sum_of_squares(x, n);
  if (squares > 1e-280 && squares < 1e280) return sqrt(squares);
  double largest = 0;
  for (int64_t d = 0; d < n; ++d) {
    const double size = fabs(double(x[d]));
    if (!(size <= largest)) largest = size;
  }
  if (largest == 0 || !(largest < HUGE_VAL)) return largest;
  double scaled = 0;
  for (int64_t d = 0; d < n; ++d) scaled += (double(x[d]) / largest) * (double(x[d]) / largest);
  return largest * sqrt(scaled);
}

template <class T>
void scale_row(T* x, int64_t n, double norm) {
  if (norm >= DBL_MIN) {
    const double inverse = 1 / norm;
    for (int64_t d = 0; d < n; ++d) x[d] = T(double(x[d]) * inverse);
  } else {
    for (int64_t d = 0; d < n; ++d) x[d] = norm == 0 ? T(0) : T(double(x[d]) / norm);
  }
}

// Multiplies a row by a power of two that brings its length near 1; returns what is left to be done for unit length.
template <class T>
T scale_by_power(T* x, int64_t n, double norm) {
  if (norm == 0) return 0;
  if (!(norm < HUGE_VAL)) return T(1 / norm);  // inf times 0 is the NaN that it should be
  int exponent;
  const double left = frexp(norm, &exponent), power = ldexp(1.0, -exponent);
  for (int64_t d = 0; d < n; ++d) x[d] = T(double(x[d]) * power);
  return T(1 / left);
}

// Reads the rows of one panel, scales them to unit length and stores them k-major. `staging` is [P][pitch].
// Returns the largest |z|^2.
template <class T>
double gather_panel(Rows<T>& rows, int64_t panel, double* norm, bool norm_known, T* staging, int64_t pitch) {
  constexpr int P = Rows<T>::P;
  const Array& x = rows.in.features;
  const int64_t D = rows.D, first = panel * P;
  const int lanes = int(rows.n - first < P ? rows.n - first : P);
  double largest = 0;
  for (int l = 0; l < lanes; ++l) {
    T* row = staging + l * pitch;
    read_row(x, rows.offset(rows.place(first + l), x), x.stride[3], D, row);
    double square = 1;
    if (rows.in.normalize) {
      if (!norm_known) norm[first + l] = length(row, D);
      if (rows.paired) rows.remainder[first + l] = scale_by_power(row, D, norm[first + l]);
      else scale_row(row, D, norm[first + l]);
      if (!(norm[first + l] < HUGE_VAL)) square = NAN;
    } else {
      if (!norm_known) norm[first + l] = 1;
      square = sum_of_squares(row, D);
      if (rows.paired) rows.remainder[first + l] = 1;
    }
    if (!(square <= largest)) largest = square;
  }
  if (rows.paired) {
    for (int l = lanes; l < P; ++l) rows.remainder[first + l] = 0;
    if constexpr (sizeof(T) == 4) {
      pack_pairs(staging, pitch, lanes, D, rows.pair_depth, rows.pair_panel(panel));
      if (rows.gradient) pack_row_pairs(staging, pitch, lanes, D, rows.depth, rows.row_pair_panel(panel));
    }
    return largest;
  }
  pack_numbers(staging, pitch, lanes, D, rows.depth, rows.panel(panel));
  return largest;
}

// Gathers all panels. The call's zero-filling rides in the same parallel region, which saves a barrier for each.
template <class T, int kFills>
void gather(Rows<T>& rows, double* norm, bool norm_known, const Fill (&fills)[kFills]) {
  constexpr int P = Rows<T>::P;
  constexpr int64_t kAlone = 1 << 20;  // bytes that one thread fills before another is awake
  int64_t bytes = 0;
  for (const Fill& fill : fills) bytes += fill.bytes;
  const int threads = bytes > kAlone ? team_size(rows.in.threads) : rows.threads;
  const int64_t pitch = (rows.D + 15) / 16 * 16 + 16;  // odd in cache lines: P rows do not share one cache set
  Scratch<T> staging(threads * P * pitch);
  Scratch<double> squares(rows.panels + 1);
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_now();
    for (const Fill& fill : fills) zero_share(fill, thread, team);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < rows.panels; ++p)
      squares[p] = gather_panel(rows, p, norm, norm_known, staging.get() + thread * P * pitch, pitch);
  }
  double largest = 0;
  for (int64_t p = 0; p < rows.panels; ++p)
    if (!(squares[p] <= largest)) largest = squares[p];
  rows.bound = largest / rows.in.temperature;
}

SADCL_KERNELS_END
