// Keys that want no gradient, alone (MoCo's queue): they pass by once.
//
// An anchor's gradient is m_i / tau (lam_i A_i / sum_j e^(s_ij) - share_i B_i) with A_i = sum_j e^(s_ij) k_j and
// B_i = sum_j f_ij k_j. Both are added up beside the sums of the loss: a block of keys is read, scaled, met by all
// anchors and forgotten, and the backward is arithmetic on [N, D]. Needs scores whose exponentials stay in range
// whatever comes (kFixedBound).
//
// Blocks have keys for rows and anchors for lanes, so that they are weights of the keys as they stand. Every thread has
// its keys and sums of its own, which are added up in the order of the threads.
#pragma once
#include "mlc_classes.h"

SADCL_KERNELS_BEGIN

// Whether the op layer made room for such a gradient.
inline bool streams(const MlcInputs& in, int64_t kept_size) {
  return !in.include_batch && in.weighting < kMsc && kept_size > 0 &&
         kept_size == mlc_keep_gradient(in.features.shape[0] * in.features.shape[1], in.features.shape[2]);
}

// Sums of `slots` threads.
template <class T>
struct StreamSums {
  int64_t numbers, pulls, n, classes;           // pulls, classes: as many numbers, or none
  Scratch<T> drawn, pulled;                     // [slots][numbers] A and B, panels as z
  Scratch<double> sum, positive, total, count;  // [slots][n]
  Scratch<double> of_class;                     // [slots][C, D] S of mlc_classes.h, in place of B
  StreamSums(int slots, int64_t numbers, int64_t n, int64_t classes)
      : numbers(numbers), pulls(classes > 0 ? 0 : numbers), n(n), classes(classes), drawn(slots * numbers + 1),
        pulled(slots * pulls + 1), sum(slots * n + 1), positive(slots * n + 1), total(slots * n + 1),
        count(slots * n + 1), of_class(slots * classes + 1) {
    for (int64_t k = 0; k < slots * numbers; ++k) drawn[k] = 0;
    for (int64_t k = 0; k < slots * pulls; ++k) pulled[k] = 0;
    for (int64_t k = 0; k < slots * classes; ++k) of_class[k] = 0;
    for (int64_t i = 0; i < slots * n; ++i) sum[i] = positive[i] = total[i] = count[i] = 0;
  }
  // Adds a slot to the first one.
  void add(int slot) {
    for (int64_t k = 0; k < numbers; ++k) drawn[k] += drawn[slot * numbers + k];
    for (int64_t k = 0; k < pulls; ++k) pulled[k] += pulled[slot * pulls + k];
    for (int64_t k = 0; k < classes; ++k) of_class[k] += of_class[slot * classes + k];
    for (int64_t i = 0, from = slot * n; i < n; ++i)
      sum[i] += sum[from + i], positive[i] += positive[from + i], total[i] += total[from + i],
          count[i] += count[from + i];
  }
};

// One block: z_j.z_i in, all sums out.
template <class T>
void add_streamed(const Vectors<T>& v, const Pairs<T>& pairs, const Block<T>& block, const T* keys, Scale<T> scale,
                  Workspace<T>& ws, StreamSums<T>& to, int slot) {
  constexpr int P = Block<T>::P;
  const Segment& s = v.segments[kKeys];
  const int64_t last = s.first * P + s.rows;
  const int rows = int(last - block.i0 < block.m ? last - block.i0 : block.m);
  T* f = ws.w_transposed;
  const bool pulls = to.pulls > 0;
  if (pulls) pairs.fill_from_keys(block, f);
  for (int jp = 0; pulls && jp < block.panels; ++jp)  // keys that are none
    memset(f + (int64_t(jp) * block.m + rows) * P, 0, size_t(block.m - rows) * P * sizeof(T));
  const auto add = [&](Scratch<double>& total, auto term) {
    sums(block, 0, block.panels, 0, rows, ws.lanes, ws.row_sums, ws.col_sums, [&](vec<T> x, int i, int jp, int q) {
      return term(x, f + (int64_t(jp) * block.m + i) * P + q * Block<T>::L, block.at(jp, i) + q * Block<T>::L);
    });
    for (int j = 0; j < block.panels * P; ++j) total[slot * to.n + block.j0 + j] += ws.col_sums[j];
  };
  if (pulls) add(to.positive, [](vec<T> x, const T* weight, T*) { return x * load(weight); });
  if (pairs.totals_wanted()) add(to.total, [](vec<T>, const T* weight, T*) { return load(weight); });
  if (pairs.counts_wanted()) add(to.count, [](vec<T>, const T* weight, T*) { return Pairs<T>::counted(load(weight)); });
  if (pulls)
    mix_panels(f, block.panels, keys, block.m / P, v.depth, to.pulled.get() + slot * to.pulls + block.j0 * v.depth);
  add(to.sum, [&](vec<T> x, const T*, T* at) {
    const vec<T> e = exp2<T>(x, scale);
    store(at, e);
    return e;
  });
  mix_panels(block.w, block.panels, keys, block.m / P, v.depth,
             to.drawn.get() + slot * to.numbers + block.j0 * v.depth);
}

// Keys from row `first` of the panels on, a row of `rows` each, to the sums of their classes.
template <class T>
void add_to_classes(const Vectors<T>& v, const Pairs<T>& pairs, int64_t first, const T* rows, double* of_class) {
  const Segment& s = v.segments[kKeys];
  for (int64_t r = first - s.first * Vectors<T>::P, l = 0; l < Vectors<T>::P && r + l < s.rows; ++l)
    pairs.for_labels(first + l, [&](int64_t c) {
      double* to = of_class + c * v.D;
      for (int64_t d = 0; d < v.D; ++d) to[d] += double(rows[l * v.pitch() + d]);
    });
}

// What pulls anchor i, from the sums of classes: to `out` [D]; returns its product with z_i.
template <class T>
double pulled_by_classes(Vectors<T>& v, const Pairs<T>& pairs, int64_t i, const double* of_class, double* out) {
  constexpr int P = Vectors<T>::P;
  for (int64_t d = 0; d < v.D; ++d) out[d] = 0;
  pairs.for_labels(i, [&](int64_t c) {
    for (int64_t d = 0; d < v.D; ++d) out[d] += pairs.class_share(c) * of_class[c * v.D + d];
  });
  double product = 0;
  for (int64_t d = 0; d < v.D; ++d) product += out[d] * double(v.panel(i / P)[d * P + i % P]);
  return product;
}

// False if a label is not allowed. kept[0] becomes 0 if the scores may be too large: then nothing else was done.
template <class T>
bool forward_in_one_sweep(const MlcForward& args) {
  constexpr int P = Vectors<T>::P, kPanels = Blocks<T>::kMaxPanels;
  const MlcInputs& in = args.in;
  T* kept = static_cast<T*>(args.kept);
  memset(kept, 0, size_t(args.kept_size) * sizeof(T));
  if (!in.normalize || !fixed_pivot<T>(1 / in.temperature)) return true;
  kept[0] = 1;
  Vectors<T> v(in, Vectors<T>::kPassingBy);
  v.gather(args.norm, nullptr);
  Pairs<T> pairs(v);
  if (!pairs.valid) return false;
  const Scale<T> scale(kLog2E / in.temperature);
  const Segment& keys = v.segments[kKeys];
  const int64_t n = v.padded(), numbers = n * v.depth, blocks = (keys.panels + kPanels - 1) / kPanels;
  const int threads = int(blocks < v.threads ? (blocks > 0 ? blocks : 1) : v.threads);
  Scratch<Workspace<T>> workspaces(threads);
  Scratch<T> staging(threads * P * v.pitch()), held(threads * (kPanels * v.depth * P));
  // The sums of classes take no more memory a thread than the keys do.
  const bool by_classes = pairs.by_classes() && 2 * pairs.classes() <= keys.rows;
  StreamSums<T> all(threads, numbers, n, by_classes ? pairs.classes() * v.D : 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    Workspace<T>& ws = workspaces[t];
    T* mine = held.get() + t * (kPanels * v.depth * P);
    for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; ++b) {
      const int64_t first = keys.first + b * kPanels, end = keys.first + keys.panels;
      const int count = int(end - first < kPanels ? end - first : kPanels);
      for (int p = 0; p < count; ++p) {
        T* rows = staging.get() + t * P * v.pitch();
        v.gather_panel(first + p, args.norm, nullptr, rows, mine + p * v.depth * P);
        if (by_classes) add_to_classes(v, pairs, (first + p) * P, rows, all.of_class.get() + t * all.classes);
      }
      for (int64_t a = 0; a < v.anchors().panels; a += kPanels) {
        const int64_t rest = v.anchors().panels - a;
        const Block<T> block = {first * P, a * P, n, count * P, int(rest < kPanels ? rest : kPanels), ws.w};
        dot_panels(mine, count, v.panel(a), block.panels, v.depth, block.w);
        add_streamed(v, pairs, block, mine, scale, ws, all, t);
      }
    }
  }
  for (int t = 1; t < threads; ++t) all.add(t);
  Scratch<double> pull(v.D + 1);
  for (int64_t i = 0; i < v.anchors().rows; ++i) {
    if (pairs.sums_wanted()) pairs.settle(i, all.total[i], all.count[i]);
    const int64_t at = i / P * v.depth * P + i % P;
    if (by_classes) all.positive[i] = pulled_by_classes(v, pairs, i, all.of_class.get(), pull.get());
    else
      for (int64_t d = 0; d < v.D; ++d) pull[d] = double(all.pulled[at + d * P]);
    write_anchor(args, pairs, i, ::log(all.sum[i]), all.positive[i]);
    if (!pairs.active[i]) continue;
    const double push = pairs.lam[i] / all.sum[i];
    for (int64_t d = 0; d < v.D; ++d)
      kept[1 + i * v.D + d] = T(push * double(all.drawn[at + d * P]) - double(pairs.share[i]) * pull[d]);
  }
  return true;
}

template <class T>
double backward_of_one_sweep(const MlcBackward& args) {
  const MlcInputs& in = args.in;
  const Array& x = in.features;
  const int64_t V = x.shape[1], D = x.shape[2], N = x.shape[0] * V;
  const T *gradients = static_cast<const T*>(args.kept) + 1, *upstream = static_cast<const T*>(args.grad_rows.data);
  Scratch<T> row(2 * D + 1);
  double total = 0;
  for (int64_t i = 0; i < N; ++i) {
    T *z = row.get(), *out = z + D;
    const T* g = gradients + i * D;
    const double norm = args.norm[i];
    const double m = args.lse[i] == HUGE_VAL
                         ? 0
                         : double(upstream[i / V * args.grad_rows.stride[0] + i % V * args.grad_rows.stride[1]]);
    memset(out, 0, size_t(D) * sizeof(T));
    if (args.lse[i] != HUGE_VAL) {
      read_row(x, i / V * x.stride[0] + i % V * x.stride[1], x.stride[2], D, z);
      scale_row(z, D, norm);
      double radial = 0;
      for (int64_t d = 0; d < D; ++d) radial += double(z[d]) * double(g[d]);
      total += m * radial;
      const double factor = norm == 0 ? 0 : m / (norm * in.temperature);
      if (norm != 0)
        for (int64_t d = 0; d < D; ++d) out[d] = T((double(g[d]) - double(z[d]) * radial) * factor);
    }
    if (args.grad_features.dims) write_row(args.grad_features.data, args.grad_features.dtype, i * D, D, out);
  }
  return -total / (in.temperature * in.temperature);
}

SADCL_KERNELS_END
