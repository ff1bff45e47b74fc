// The released code's R (oracle: sadcl/reference/sscl.py): it enters that formulation's value, not its gradient.
//
// R[(b, v), (b', v')] is the largest score between the two over the classes both images have, and at least 0 unless
// they share every class. It is wanted at the positives only, as mean over a row's positives p of R_ip. So: a stripe of
// R for a few images at a time; each class leaves its scores there by maximum; then each row reads its positives'
// entries back.
#pragma once
#include "sscl_rows.h"

SADCL_KERNELS_BEGIN

constexpr int64_t kStripeEntries = 1 << 20;  // of R, for each thread (4 MB)

template <class T>
struct Stripe {
  Rows<T>& rows;
  const T* square;  // [n][n] z_i.z_j, or null: compute them
  int64_t image0, image1;
  T* entries;           // [(image1 - image0) * V][B * V]
  const uint8_t* full;  // [B] does the image have every class?

  int64_t width() const { return rows.in.features.shape[0] * rows.V; }
  // Number of row i's (image, view).
  int64_t view_of(int64_t i) const { return rows.in.pairs[i / rows.V] / rows.C * rows.V + i % rows.V; }
  T* entry_row(int64_t i) const { return entries + (view_of(i) - image0 * rows.V) * width(); }

  // The class's rows whose image is in the stripe: images ascend within a class.
  Range inside(const Range& all) const {
    const int32_t* pairs = rows.in.pairs;
    int64_t p = all.first / rows.V;
    const int64_t end = all.last / rows.V;
    while (p < end && pairs[p] / rows.C < image0) ++p;
    const int64_t first = p;
    while (p < end && pairs[p] / rows.C < image1) ++p;
    return {first * rows.V, p * rows.V};
  }

  void reset() const {
    for (int64_t b = image0; b < image1; ++b)
      for (int64_t v = 0; v < rows.V; ++v)
        for (int64_t j = 0; j < width(); ++j)
          entries[((b - image0) * rows.V + v) * width() + j] = full[b] && full[j / rows.V] ? T(-HUGE_VAL) : T(0);
  }

  void raise(int64_t i, int64_t j, T score) const {
    T& entry = entry_row(i)[view_of(j)];
    if (!(score <= entry)) entry = score;
  }

  void add_class(const Range& all, const Range& mine, T* block) const {
    constexpr int P = Rows<T>::P;
    const T factor = T(1 / rows.in.temperature);
    if (square != nullptr) {
      for (int64_t i = mine.first; i < mine.last; ++i)
        for (int64_t j = all.first; j < all.last; ++j)
          if (i != j) raise(i, j, square[i * rows.n + j] * factor);
      return;
    }
    for (int64_t ip = mine.first / P; ip * P < mine.last; ++ip)
      for (int64_t jp = all.first / P; jp * P < all.last; ++jp) {
        dot_panels(rows.panel(ip), 1, rows.panel(jp), 1, rows.depth, block);
        for (int r = 0; r < P; ++r)
          for (int l = 0; l < P; ++l) {
            const int64_t i = ip * P + r, j = jp * P + l;
            if (i >= mine.first && i < mine.last && j >= all.first && j < all.last && i != j)
              raise(i, j, block[r * P + l] * factor);
          }
      }
  }

  void read_class(const Range& all, const Range& mine, double* mean) const {
    for (int64_t i = mine.first; i < mine.last; ++i) {
      double total = 0;
      const T* row = entry_row(i);
      for (int64_t j = all.first; j < all.last; ++j)
        if (i != j) total += row[view_of(j)];
      mean[i] = total / double(all.last - all.first - 1);
    }
  }
};

// mean[i], for rows with at least one positive.
template <class T>
void released_maxima(Rows<T>& rows, const T* square, double* mean) {
  constexpr int P = Rows<T>::P;
  if (rows.n == 0) return;
  const SsclRows& in = rows.in;
  const int64_t images = in.features.shape[0], width = images * rows.V, active = rows.n / rows.V;
  Scratch<uint8_t> full(images + 1);
  {
    Scratch<int32_t> labels(images + 1);
    memset(labels.get(), 0, size_t(images) * sizeof(int32_t));
    for (int64_t p = 0; p < active; ++p) ++labels[in.pairs[p] / rows.C];
    for (int64_t b = 0; b < images; ++b) full[b] = labels[b] == rows.C;
  }
  int64_t step = kStripeEntries / (width * rows.V);
  const int64_t share = (images + rows.threads - 1) / rows.threads;
  step = step < 1 ? 1 : step > share ? share : step;
  const int64_t stripe_size = step * rows.V * width;
  Scratch<T> entries(rows.threads * stripe_size), blocks(int64_t(rows.threads) * P * P);
#pragma omp parallel for num_threads(rows.threads) schedule(dynamic, 1)
  for (int64_t image = 0; image < images; image += step) {
    const int thread = thread_index();
    const Stripe<T> stripe{
        rows,      square, image, image + step < images ? image + step : images, entries.get() + thread * stripe_size,
        full.get()};
    stripe.reset();
    for (int64_t c = 0; c < in.num_classes; ++c) {
      const Range all = rows.rows_of(c);
      stripe.add_class(all, stripe.inside(all), blocks.get() + int64_t(thread) * P * P);
    }
    for (int64_t c = 0; c < in.num_classes; ++c) {
      const Range all = rows.rows_of(c);
      if (all.last - all.first > 1) stripe.read_class(all, stripe.inside(all), mean);
    }
  }
}

SADCL_KERNELS_END
