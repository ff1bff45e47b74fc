// mulsupcon by classes. Its weight of a pair is a sum over classes, f_ij = sum_c y_ic y_jc w_c, so the sum of what
// pulls anchor i is had without any pair,
//
//   sum_j f_ij z_j = sum_c y_ic w_c (S_c - z_i),   S_c = sum of the columns that have c
//
// (z_i leaves if it is a column), and so is what anchors pull column j by: sum_c y_jc w_c (M_c - pull_j z_j), M_c = sum
// of pull_i z_i over the anchors that have c. 4 D flops a label instead of 2 D and a weight a pair; the sweep over
// pairs is plain SupCon's. Sums are float64: S_c - z_i may cancel.
#pragma once
#include "mlc_weights.h"

SADCL_KERNELS_BEGIN

// Numbers of a vector that are worked on at a time. Slices share nothing, so the threads split them, and no bit depends
// on how.
constexpr int kSlice = 16;

// The classes of every row of the panels: bits would be searched once a slice.
struct ClassLists {
  Scratch<int64_t> start;
  Scratch<int32_t> classes;

  template <class T>
  explicit ClassLists(const Pairs<T>& pairs) : start(pairs.rows() + 1), classes(pairs.labels() + 1) {
    int64_t at = 0;
    for (int64_t i = 0; i < pairs.rows(); ++i) {
      start[i] = at;
      pairs.for_labels(i, [&](int64_t c) { classes[at++] = int32_t(c); });
    }
    start[pairs.rows()] = at;
  }
  template <class F>
  void for_labels(int64_t i, F f) const {
    for (int64_t k = start[i]; k < start[i + 1]; ++k) f(int64_t(classes[k]));
  }
};

// One slice of S, of M where `pull` is there, and what follows of them: radial[i] = z_i . sum_j f_ij z_j, and in the
// backward what moves each vector, taken from `gradients` (panels as z) where it is wanted.
template <class T>
struct ClassSlice {
  static constexpr int P = Vectors<T>::P;
  Vectors<T>& v;
  const Pairs<T>& pairs;
  const ClassLists& lists;
  int64_t d0;
  const T* pull;
  T* gradients;
  const bool* wanted;                  // by segment
  double *radial, *columns, *anchors;  // [anchors], [C][kSlice] S and M

  // The slice of a panel's vectors, a row each; zero beyond D.
  void take_slice(int64_t panel, T* rows) const {
    memset(rows, 0, P * kSlice * sizeof(T));
    if (v.paired) return v.unpack(panel, d0, kSlice, rows);
    const T* z = v.panel(panel) + d0 * P;
    for (int d = 0; d < kSlice && d0 + d < v.D; ++d)
      for (int l = 0; l < P; ++l) rows[l * kSlice + d] = z[d * P + l];
  }

  // Calls f(number in the panels, number in the segment, slice, panel) for every vector of a segment.
  template <class F>
  void for_rows(int segment, F f) const {
    alignas(64) T rows[P * kSlice];
    const Segment& s = v.segments[segment];
    for (int64_t p = 0; p < s.panels; ++p) {
      take_slice(s.first + p, rows);
      for (int64_t r = p * P; r < s.rows && r < (p + 1) * P; ++r)
        f(s.first * P + r, r, rows + (r - p * P) * kSlice, s.first + p);
    }
  }

  void add_up() const {
    const bool own = v.in.include_batch;
    if (own || pull != nullptr)
      for_rows(kAnchors, [&](int64_t i, int64_t, const T* z, int64_t) {
        const double m = pull == nullptr ? 0 : double(pull[i]);
        lists.for_labels(i, [&](int64_t c) {
          for (int d = 0; d < kSlice; ++d) {
            if (own) columns[c * kSlice + d] += double(z[d]);
            if (pull != nullptr) anchors[c * kSlice + d] += m * double(z[d]);
          }
        });
      });
    for_rows(kKeys, [&](int64_t j, int64_t, const T* z, int64_t) {
      lists.for_labels(j, [&](int64_t c) {
        for (int d = 0; d < kSlice; ++d) columns[c * kSlice + d] += double(z[d]);
      });
    });
  }

  void take(int64_t row, int64_t panel, const double* moved) const {
    T* to = gradients + (panel * v.depth + d0) * P + row % P;
    for (int d = 0; d < kSlice && d0 + d < v.D; ++d) to[d * P] -= T(moved[d]);
  }

  void hand_out() const {
    const double own = v.in.include_batch ? 1 : 0;
    for_rows(kAnchors, [&](int64_t i, int64_t r, const T* z, int64_t panel) {
      double drawn[kSlice] = {}, drawing[kSlice] = {}, total = 0;
      const double m = pull == nullptr ? 0 : double(pull[i]);
      lists.for_labels(i, [&](int64_t c) {
        const double share = pairs.class_share(c);
        for (int d = 0; d < kSlice; ++d) {
          drawn[d] += share * (columns[c * kSlice + d] - own * double(z[d]));
          if (pull != nullptr) drawing[d] += share * (anchors[c * kSlice + d] - m * double(z[d]));
        }
      });
      for (int d = 0; d < kSlice; ++d) total += drawn[d] * double(z[d]), drawn[d] = m * drawn[d] + own * drawing[d];
      radial[r] = total;
      if (pull != nullptr && wanted[kAnchors]) take(i, panel, drawn);
    });
    if (pull == nullptr || !wanted[kKeys]) return;
    for_rows(kKeys, [&](int64_t j, int64_t, const T*, int64_t panel) {
      double drawing[kSlice] = {};
      lists.for_labels(j, [&](int64_t c) {
        for (int d = 0; d < kSlice; ++d) drawing[d] += pairs.class_share(c) * anchors[c * kSlice + d];
      });
      take(j, panel, drawing);
    });
  }
};

// positive[i] = sum_j f_ij z_i.z_j; and in the backward `gradients` without what pulls.
template <class T>
void pull_by_classes(Vectors<T>& v, const Pairs<T>& pairs, double* positive, const T* pull = nullptr,
                     T* gradients = nullptr, const bool* wanted = nullptr) {
  const int64_t n = v.anchors().rows, slices = (v.D + kSlice - 1) / kSlice, sums = pairs.classes() * kSlice;
  const ClassLists lists(pairs);
  Scratch<double> radial(slices * n + 1), columns(v.threads * sums + 1), anchors(v.threads * sums + 1);
#pragma omp parallel for num_threads(v.threads) schedule(static)
  for (int64_t s = 0; s < slices; ++s) {
    double *mine = columns.get() + thread_index() * sums, *theirs = anchors.get() + thread_index() * sums;
    for (int64_t k = 0; k < sums; ++k) mine[k] = theirs[k] = 0;
    const ClassSlice<T> slice = {v,    pairs, lists, s * kSlice, pull, gradients, wanted, radial.get() + s * n,
                                 mine, theirs};
    slice.add_up();
    slice.hand_out();
  }
  for (int64_t i = 0; i < n; ++i) {
    positive[i] = 0;
    for (int64_t s = 0; s < slices; ++s) positive[i] += radial[s * n + i];
  }
}

SADCL_KERNELS_END
