// The vectors of an image-level loss as panels (panels.h): anchors, keys, prototypes, each from a panel of its own on.
//
// Everything is numbered by its place in the panels: row p * P + lane. A segment's last panel is filled up with zeros.
#pragma once
#include "mlc.h"
#include "sscl_forward.h"

SADCL_KERNELS_BEGIN

enum { kAnchors, kKeys, kPrototypes, kSegments };

struct Segment {
  int64_t rows = 0, first = 0, panels = 0;  // vectors, first panel, number of panels
  int64_t before = 0;                       // vectors of the segments before it
};

template <class T>
struct Vectors {
  static constexpr int P = Tile<T>::P;

  const MlcInputs& in;
  int64_t V, D, depth;
  Segment segments[kSegments];
  int64_t panels = 0, held;  // of all segments, and in z
  int threads;
  double bound = 0;  // of |s_ij|; NaN if a vector is not finite

  // What they are gathered for: everything; scores alone, of bfloat16 by its own products where there is an instruction
  // (`pairs` and `remainder` in place of z, see sscl_rows.h); keys that pass by once (mlc_stream.h: z of anchors
  // alone).
  enum Use { kEverything, kScoresAlone, kPassingBy };
  bool paired;
  int64_t pair_depth;
  Scratch<T> z;          // [panels][depth][P]
  Scratch<Pair> pairs;   // [panels][pair_depth][P]
  Scratch<T> remainder;  // [panels * P]

  explicit Vectors(const MlcInputs& args, Use use = kEverything)
      : in(args), V(args.features.shape[1]), D(args.features.shape[2]), depth(Rows<T>::rounded_up(D)),
        held(held_panels(args, use)), threads(team_size(args.threads)),
        paired(kHasPairs && use == kScoresAlone && args.normalize && args.features.dtype == kBF16),
        pair_depth(Rows<T>::rounded_up((D + 1) / 2)), z((paired ? 0 : held) * depth * P + 1),
        pairs((paired ? held : 0) * pair_depth * P + 1), remainder(paired ? held * P + 1 : 1) {
    if (double(anchors().rows) * double(panels * P) * double(depth) < 5e5) threads = 1;
  }

  const Segment& anchors() const { return segments[kAnchors]; }
  int64_t padded() const { return anchors().panels * P; }  // anchors and the padding behind them
  T* panel(int64_t p) { return z.get() + p * depth * P; }
  Pair* pair_panel(int64_t p) { return pairs.get() + p * pair_depth * P; }
  // Numbers [d0, d0 + count) of panel p's pairs as far as there are any, a vector in a row of `rows` [P][count].
  void unpack(int64_t p, int64_t d0, int count, T* rows) {
    for (int d = 0; d < count && d0 + d < D; d += 2)
      for (int l = 0; l < P; ++l) {
        const uint32_t two = pair_panel(p)[(d0 + d) / 2 * P + l].bits, bits[2] = {two << 16, two & 0xffff0000u};
        float both[2];
        memcpy(both, bits, sizeof both);
        for (int h = 0; h < 2; ++h) rows[l * count + d + h] = T(both[h]) * remainder[p * P + l];
      }
  }

  const Array& array(int segment) const {
    return segment == kAnchors ? in.features : segment == kKeys ? in.keys : in.prototypes;
  }
  int64_t offset(int segment, int64_t row) const {
    const Array& a = array(segment);
    return segment == kAnchors ? row / V * a.stride[0] + row % V * a.stride[1] : row * a.stride[0];
  }

  // Reads the vectors and scales them to unit length. With `lse` the norms are known, and anchors without a positive
  // that are no columns are left out: they may hold anything.
  void gather(double* norm, const double* lse) {
    Scratch<T> staging(threads * P * pitch());
    Scratch<double> squares(held + 1);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < held; ++p)
      squares[p] = gather_panel(p, norm, lse, staging.get() + thread_index() * P * pitch(), panel(p));
    double largest = 0;
    for (int64_t p = 0; p < held; ++p)
      if (!(squares[p] <= largest)) largest = squares[p];
    bound = largest / in.temperature;
  }

  int64_t pitch() const { return (D + 15) / 16 * 16 + 16; }  // of staging, [P][pitch]

  // Panel p to `out`, or to its pairs; returns the largest |z|^2.
  double gather_panel(int64_t p, double* norm, const double* lse, T* staging, T* out) {
    const int64_t pitch = this->pitch();
    int segment = kAnchors;
    while (p >= segments[segment].first + segments[segment].panels) ++segment;
    const Segment& s = segments[segment];
    const Array& x = array(segment);
    const int64_t first = (p - s.first) * P;
    const int lanes = int(s.rows - first < P ? s.rows - first : P);
    double largest = 0;
    for (int l = 0; l < lanes; ++l) {
      T* row = staging + l * pitch;
      if (segment == kAnchors && lse != nullptr && !in.include_batch && lse[first + l] == HUGE_VAL) {
        memset(row, 0, size_t(D) * sizeof(T));
        continue;
      }
      read_row(x, offset(segment, first + l), x.stride[x.dims - 1], D, row);
      double& length_of = norm[s.before + first + l];
      double square = 1;
      if (in.normalize) {
        if (lse == nullptr) length_of = length(row, D);
        if (paired) remainder[p * P + l] = scale_by_power(row, D, length_of);
        else scale_row(row, D, length_of);
        if (!(length_of < HUGE_VAL)) square = NAN;
      } else {
        if (lse == nullptr) length_of = 1;
        square = sum_of_squares(row, D);
      }
      if (!(square <= largest)) largest = square;
    }
    if (paired) {
      for (int l = lanes; l < P; ++l) remainder[p * P + l] = 0;
      if constexpr (sizeof(T) == 4) pack_pairs(staging, pitch, lanes, D, pair_depth, pair_panel(p));
      return largest;
    }
    pack_numbers(staging, pitch, lanes, D, depth, out);
    return largest;
  }

 private:
  int64_t held_panels(const MlcInputs& args, Use use) {
    const int64_t rows[kSegments] = {args.features.shape[0] * args.features.shape[1],
                                     args.keys.dims ? args.keys.shape[0] : 0,
                                     args.prototypes.dims ? args.prototypes.shape[0] : 0};
    int64_t before = 0;
    for (int s = 0; s < kSegments; ++s) {
      segments[s].rows = rows[s], segments[s].first = panels, segments[s].panels = (rows[s] + P - 1) / P;
      segments[s].before = before;
      before += rows[s], panels += segments[s].panels;
    }
    return use == kPassingBy ? anchors().panels : panels;
  }
};

// Calls task(a, b) for every a < rows, b < columns, in rounds in which no two tasks share an a or a b.
template <class Task>
void for_every_pair(int64_t rows, int64_t columns, [[maybe_unused]] int threads, Task task) {
  const int64_t rounds = rows > columns ? rows : columns;
#pragma omp parallel num_threads(threads)
  for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t a = 0; a < rows; ++a) {
      const int64_t b = (a + round) % rounds;
      if (b < columns) task(a, b);
    }
  }
}

// Where the scores of anchors against anchors come from: kept[size] takes them (write) or has them.
template <class T>
struct Scores {
  bool wanted = true;  // else blocks hold nothing
  T* kept = nullptr;
  int64_t size = 0;
  bool write = false;
};

// Calls visit(block, segment, workspace) for every block of scores, which holds z_i.z_j: of anchors against anchors
// those on and above the diagonal, of anchors against keys and prototypes all.
template <class T, class Visit>
void sweep(Vectors<T>& v, Scratch<Workspace<T>>& workspaces, const Scores<T>& scores, Visit visit) {
  constexpr int P = Vectors<T>::P;
  const Blocks<T> own(v.anchors().panels, v.threads);
  const Kept<T> kept(scores.kept, scores.size, own);
  if (scores.write) kept.begin();
  const bool usable = kept.valid();
  const auto run = [&](const Range& i, const Range& j, int segment, T* copy) {
    Workspace<T>& ws = workspaces[thread_index()];
    const Block<T> block = {i.first * P,           j.first * P, v.padded(), int(i.last - i.first) * P,
                            int(j.last - j.first), ws.w};
    const size_t bytes = size_t(block.m) * size_t(block.panels) * P * sizeof(T);
    if (copy != nullptr && !scores.write) {
      memcpy(block.w, copy, bytes);
    } else if (scores.wanted) {
      compute_scores(v, block);
      if (copy != nullptr) memcpy(copy, block.w, bytes);
    }
    visit(block, segment, ws);
  };
  if (v.in.include_batch)
    for_all_pairs(own.count, v.threads, [&](int64_t a, int64_t b) {
      run(own.panels_of(a), own.panels_of(b), kAnchors, usable ? kept.at(a, b) : nullptr);
    });
  for (int segment = kKeys; segment < kSegments; ++segment) {
    const Segment& s = v.segments[segment];
    if (s.panels == 0) continue;
    const Blocks<T> others(s.panels, v.threads);
    for_every_pair(own.count, others.count, v.threads, [&](int64_t a, int64_t b) {
      const Range j = others.panels_of(b);
      run(own.panels_of(a), {s.first + j.first, s.first + j.last}, segment, nullptr);
    });
  }
}

SADCL_KERNELS_END
