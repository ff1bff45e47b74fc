// Labels as bits, and what a pair of images weighs by them.
//
// Two planes of words as wide as T, so that a lane of labels meets its lane of scores: `has` and `ignores`,
// [panels][words][P]. Of a row i only its words that are not empty are visited, few in a multi-label batch.
#pragma once
#include "mlc_formula.h"
#include "mlc_vectors.h"
#include "words.h"

SADCL_KERNELS_BEGIN

template <class T>
class Pairs {
 public:
  static constexpr int P = Tile<T>::P, L = Simd<T>::kLanes, kBits = int(sizeof(T)) * 8;
  typedef typename Word<T>::S S;
  typedef typename Word<T>::V W;

  Scratch<double> lam;      // [padded] sum over j of W_ij
  Scratch<T> share;         // [padded] W_ij = share_i f_ij, f as `fill` gives it
  Scratch<uint8_t> active;  // [padded] whether there is a positive
  bool valid = true;        // labels hold nothing but 0, 1, -1

  // known: what `give_terms` gave in the forward, or null: count.
  explicit Pairs(Vectors<T>& v, const T* known = nullptr)
      : lam(v.padded() + 1), share(v.padded() + 1), active(v.padded() + 1), v_(v), in_(v.in), kind_(v.in.weighting),
        C_(v.in.labels.dims ? v.in.labels.shape[1] : 0), words_((C_ + kBits - 1) / kBits),
        rows_((v.segments[kKeys].first + v.segments[kKeys].panels) * P), has_(rows_ * words_ + 1),
        ignores_(rows_ * words_ + 1), ones_(rows_ + 1), unknown_(rows_ + 1), of_class_(C_ + 1),
        table_(kind_ == kMsc ? rows_ * C_ + 1 : 1) {
    for (int64_t i = 0; i < v.padded(); ++i) lam[i] = 0, share[i] = 0, active[i] = 0;
    if (kind_ != kDense) pack();
    if (kind_ == kMsc) memset(table_.get(), 0, size_t(rows_ * C_) * sizeof(T));  // padding is read too
    if (in_.peers != nullptr) {
      take_shares(*in_.peers);
      return;
    }
    if (kind_ == kMulSupCon) count_classes();
    [[maybe_unused]] const int threads = v.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < v_.anchors().rows; ++i) {
      if (kind_ == kMsc) known != nullptr ? take_terms(i, known + i * C_) : count_msc(i);
      share[i] = 1;
    }
  }

  // Whether lam and share follow from sums over the columns (`settle`), and from which: of f, and of `counted`.
  bool sums_wanted() const { return kind_ != kMulSupCon && kind_ != kMsc; }
  bool totals_wanted() const { return sums_wanted() && kind_ != kAll && kind_ != kAny && kind_ != kIds; }
  bool counts_wanted() const { return sums_wanted() && kind_ != kOverlap; }
  void settle(int64_t i, double total, double count) {
    if (!totals_wanted()) total = count;
    if (!counts_wanted()) count = total;
    active[i] = count > 0;
    if (count == 0) return;
    const double divisor = kind_ == kDense ? 1.0 : count;
    share[i] = T(1 / divisor), lam[i] = total / divisor;
  }

  // msc: what the classes of an anchor weigh, [N, C], from a pass over all pairs of labels.
  void give_terms(T* to) const {
    for (int64_t i = 0; i < v_.anchors().rows; ++i)
      for (int64_t c = 0; c < C_; ++c) to[i * C_ + c] = entry(i, c);
  }

  // 1 for a positive, 0 for none; a positive that weighs nothing is -0.
  static vec<T> counted(vec<T> f) { return bits_of<T>(f) != 0 ? splat(T(1)) : vec<T>{}; }

  // Whether f is the same from both sides.
  bool symmetric() const { return kind_ != kSimDis && kind_ != kMsc && kind_ != kDense; }

  // Whether sums over classes take the place of weights of pairs (mlc_classes.h): mulsupcon, unless the classes are so
  // many that setting their sums to zero is the work.
  bool by_classes() const {
    return kind_ == kMulSupCon && C_ <= (in_.include_batch ? v_.anchors().rows : 0) + v_.segments[kKeys].rows;
  }
  int64_t classes() const { return C_; }
  int64_t rows() const { return rows_; }  // anchors and keys, with their padding
  int64_t labels() const {                // that they have
    int64_t total = 0;
    for (int64_t i = 0; i < rows_; ++i) total += int64_t(ones_[i]);
    return total;
  }
  double class_share(int64_t c) const { return double(of_class_[c]); }

  // Calls f(c) for every label of a row.
  template <class F>
  void for_labels(int64_t i, F f) const {
    const S* has = row_words(has_, i);
    for (int64_t w = 0; w < words_; ++w)
      for (S rest = has[w * P]; rest != 0; rest &= rest - 1) f(w * kBits + __builtin_ctzll(rest));
  }

  // Whether f_ji is wanted and not f_ij: the columns are anchors.
  bool both_ways(int segment) const {
    return !symmetric() && (segment == kAnchors || (in_.peers != nullptr && in_.peers->both));
  }

  // f_ij of a block, laid out as it; and f_ji where that is another number.
  void fill(const Block<T>& block, int segment, T* f, T* back) const {
    const bool both = both_ways(segment);
    for (int jp = 0; jp < block.panels; ++jp)
      for (int i = 0; i < block.m; ++i)
        for (int q = 0; q < 3; ++q) {
          const int64_t at = (int64_t(jp) * block.m + i) * P + q * L;
          const Value value = pair(block.i0 + i, block.j0 + int64_t(jp) * P + q * L, segment, both);
          store(f + at, value.ij);
          if (both) store(back + at, value.ji);
        }
  }

  // The same with keys for rows and anchors for lanes: f of anchor j towards key i. No dense weights.
  void fill_from_keys(const Block<T>& block, T* f) const {
    for (int jp = 0; jp < block.panels; ++jp)
      for (int i = 0; i < block.m; ++i)
        for (int q = 0; q < 3; ++q)
          store(f + (int64_t(jp) * block.m + i) * P + q * L,
                pair(block.i0 + i, block.j0 + int64_t(jp) * P + q * L, kKeys, true).ji);
  }

 private:
  struct Value {
    vec<T> ij, ji;
  };
  struct Counts {
    vec<T> both, own, theirs, known;
  };

  static vec<T> numbers(W x) { return __builtin_convertvector((typename Simd<T>::I)x, vec<T>); }
  const S* row_words(const Scratch<S>& plane, int64_t i) const { return plane.get() + i / P * words_ * P + i % P; }
  W lanes(const Scratch<S>& plane, int64_t j, int64_t word) const {
    W x;
    memcpy(&x, plane.get() + (j / P * words_ + word) * P + j % P, sizeof x);
    return x;
  }

  // Of row i against the lanes from j on.
  SADCL_INLINE Counts counts(int64_t i, int64_t j) const {
    W both = {}, hidden = {}, unseen = {}, blind = {};
    const S *has = row_words(has_, i), *ignores = row_words(ignores_, i);
    for (int64_t w = 0; w < words_; ++w) {
      const S h = has[w * P], g = ignores[w * P];
      if (h != 0) {
        both += population<T>(lanes(has_, j, w) & h);
        if (some_ignored_) hidden += population<T>(lanes(ignores_, j, w) & h);
      }
      if (g != 0) {
        unseen += population<T>(lanes(has_, j, w) & g);
        blind += population<T>(lanes(ignores_, j, w) & g);
      }
    }
    Counts c;
    c.both = numbers(both);
    c.own = ones_[i] - numbers(hidden);
    c.theirs = loadu(ones_.get() + j) - numbers(unseen);
    c.known = (T(C_) - unknown_[i]) - (loadu(unknown_.get() + j) - numbers(blind));
    return c;
  }

  // Sum over the classes c of row i that the lanes have of value(c).
  template <class F>
  SADCL_INLINE void for_shared(int64_t i, int64_t j, F f) const {
    const S* has = row_words(has_, i);
    for (int64_t w = 0; w < words_; ++w)
      for (S rest = has[w * P]; rest != 0; rest &= rest - 1) {
        const int bit = __builtin_ctzll(rest);
        f(w * kBits + bit, numbers((lanes(has_, j, w) >> bit) & 1));
      }
  }

  SADCL_INLINE Value pair(int64_t i, int64_t j, int segment, bool both) const {
    Value out = {};
    if (kind_ == kDense) return dense(i, j, segment, both);
    if (kind_ == kIds) {
      const W same = (W)(lanes(has_, j, 0) == *row_words(has_, i));
      out.ij = out.ji = numbers(same & 1);
      return out;
    }
    if (segment == kPrototypes) {
      const int64_t first = j - v_.segments[kPrototypes].first * P;
      for (int l = 0; l < L && first + l < C_; ++l) out.ij[l] = entry(i, first + l);
      return out;
    }
    if (kind_ == kMulSupCon) {
      vec<T> total = {};
      for_shared(i, j, [&](int64_t c, vec<T> there) { total += there * of_class_[c]; });
      out.ij = out.ji = total;
      return out;
    }
    const Counts c = counts(i, j);
    const vec<T> either = c.own + c.theirs - c.both, zero = {}, one = splat(T(1));
    if (kind_ == kAll) {
      out.ij = ((c.both == either) & (c.known > T(0))) ? one : zero;
    } else if (kind_ == kAny) {
      out.ij = c.both > T(0) ? one : zero;
    } else if (kind_ == kJaccard || kind_ == kOverlap) {
      const vec<T> value = overlap_of<T>(c.both, either);
      const auto positive = (either > T(0)) & (c.both * T(in_.least.of) >= either * T(in_.least.shared));
      if (kind_ == kOverlap) out.ij = value;
      else out.ij = positive ? (c.both > T(0) ? value : splat(T(-0.0))) : zero;
    } else if (kind_ == kSimDis) {
      out.ij = similarity_of<T>(c.both, c.own, c.theirs);
      out.ji = similarity_of<T>(c.both, c.theirs, c.own);
      return out;
    } else {
      const vec<T> term = T(in_.alpha) / at_least_one<T>(either);
      vec<T> forth = {}, back = {};
      for_shared(i, j, [&](int64_t k, vec<T> there) {
        forth += there * entry(i, k);
        if (both) back += loadu(table_.get() + (j / P * C_ + k) * P + j % P);
      });
      out.ij = term * forth, out.ji = term * back;
      return out;
    }
    out.ji = out.ij;
    return out;
  }

  const T& entry(int64_t i, int64_t c) const { return table_[(i / P * C_ + c) * P + i % P]; }
  T& entry(int64_t i, int64_t c) { return table_[(i / P * C_ + c) * P + i % P]; }

  // Column number of the vector at j in the dense weights, -1 for padding.
  int64_t column(int64_t j, int segment) const {
    const Segment& s = v_.segments[segment];
    const int64_t at = j - s.first * P;
    return at >= s.rows ? -1 : at + (segment == kKeys && in_.include_batch ? v_.anchors().rows : 0);
  }
  T weight(const Array& a, int64_t i, int64_t column) const {
    T value;
    if (i >= v_.anchors().rows || column < 0) return 0;
    if constexpr (sizeof(T) == 8) {
      if (a.dtype != kF64) return T(widened(a, i * a.stride[0] + column * a.stride[1]));
    } else if (a.dtype == kF64) {
      return T(static_cast<const double*>(a.data)[i * a.stride[0] + column * a.stride[1]]);
    }
    read_row(a, i * a.stride[0] + column * a.stride[1], 1, 1, &value);
    return value;
  }
  static float widened(const Array& a, int64_t offset) {
    float value;
    read_row(a, offset, 1, 1, &value);
    return value;
  }
  Value dense(int64_t i, int64_t j, int segment, bool both) const {
    Value out = {};
    for (int l = 0; l < L; ++l) {
      out.ij[l] = i == j + l ? T(0) : weight(in_.weights, i, column(j + l, segment));
      if (both && in_.peers != nullptr) out.ji[l] = weight(in_.peers->weights_back, i, column(j + l, segment));
      else if (both && i < v_.anchors().rows && i != j + l) out.ji[l] = weight(in_.weights, j + l, i);
    }
    out.ij = out.ij + T(0), out.ji = out.ji + T(0);  // no -0: see `counted`
    return out;
  }

  // --- once a call ---

  void pack() {
    memset(has_.get(), 0, size_t(rows_ * words_) * sizeof(S));
    memset(ignores_.get(), 0, size_t(rows_ * words_) * sizeof(S));
    for (int64_t i = 0; i < rows_; ++i) ones_[i] = 0, unknown_[i] = 0;
    bool wrong = false, ignored = false;
    for (int segment = kAnchors; segment <= kKeys; ++segment) {
      const Segment& s = v_.segments[segment];
      [[maybe_unused]] const int threads = v_.threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : wrong, ignored)
      for (int64_t p = 0; p < s.panels; ++p)
        for (int64_t r = p * P; r < s.rows && r < (p + 1) * P; ++r) {
          const Array& a = segment == kAnchors ? in_.labels : in_.key_labels;
          const int64_t row = segment == kAnchors ? r / v_.V : r;
          int64_t counted[2] = {0, 0};
          wrong = !pack_row(a, row, s.first * P + r, counted) || wrong;
          ones_[s.first * P + r] = T(counted[0]), unknown_[s.first * P + r] = T(counted[1]);
          ignored = ignored || counted[1] > 0;
        }
    }
    valid = !wrong, some_ignored_ = ignored;
  }

  bool pack_row(const Array& a, int64_t row, int64_t at, int64_t* counted) {
    const int64_t offset = row * a.stride[0], stride = a.stride[1];
    if (kind_ == kIds) {
      has_[at] = S(static_cast<const int32_t*>(a.data)[offset]);  // words_ is 1
      return true;
    }
    switch (a.dtype) {
      case kF32: return pack_as(static_cast<const float*>(a.data) + offset, stride, at, counted);
      case kF64: return pack_as(static_cast<const double*>(a.data) + offset, stride, at, counted);
      case kBF16: return pack_as(static_cast<const BFloat16*>(a.data) + offset, stride, at, counted);
      case kF16: return pack_as(static_cast<const Float16*>(a.data) + offset, stride, at, counted);
      case kU8: return pack_as(static_cast<const uint8_t*>(a.data) + offset, stride, at, counted);
      case kI8: return pack_as(static_cast<const int8_t*>(a.data) + offset, stride, at, counted);
      case kI16: return pack_as(static_cast<const int16_t*>(a.data) + offset, stride, at, counted);
      case kI32: return pack_as(static_cast<const int32_t*>(a.data) + offset, stride, at, counted);
      default: return pack_as(static_cast<const int64_t*>(a.data) + offset, stride, at, counted);
    }
  }
  template <class X>
  static X number(X x) {
    return x;
  }
  static float number(BFloat16 x) { return widen(x); }
  static float number(Float16 x) { return widen(x); }

  // A word at a time, without a branch: labels come in no order that a processor could guess.
  template <class X>
  bool pack_as(const X* x, int64_t stride, int64_t at, int64_t* counted) {
    S *has = has_.get() + at / P * words_ * P + at % P, *ignores = ignores_.get() + at / P * words_ * P + at % P;
    bool fine = true;
    for (int64_t c0 = 0; c0 < C_; c0 += kBits, has += P, ignores += P) {
      const int count = int(C_ - c0 < kBits ? C_ - c0 : kBits);
      S yes = 0, hidden = 0, no = 0;
      for (int b = 0; b < count; ++b) {
        const auto y = number(x[(c0 + b) * stride]);
        typedef decltype(y + 0) N;
        yes |= S(y == N(1)) << b, no |= S(y == N(0)) << b;
        hidden |= S(N(-1) < N(0) && y == N(-1)) << b;
      }
      *has = yes, *ignores = hidden;
      counted[0] += __builtin_popcountll(yes), counted[1] += __builtin_popcountll(hidden);
      fine &= (yes | hidden | no) == (S(~S(0)) >> (kBits - count));
    }
    return fine;
  }

  // What a part of the columns cannot say comes from outside.
  void take_shares(const MlcPeers& peers) {
    for (int64_t i = 0; i < v_.anchors().rows; ++i) share[i] = 1;
    if (kind_ == kMulSupCon) memcpy(of_class_.get(), peers.class_share, size_t(C_) * sizeof(T));
    if (kind_ != kMsc) return;
    for (int segment = kAnchors; segment <= kKeys; ++segment) {
      const T* from = static_cast<const T*>(segment == kAnchors ? peers.table : peers.table_back);
      const Segment& s = v_.segments[segment];
      for (int64_t r = 0; from != nullptr && r < s.rows; ++r)
        for (int64_t c = 0; c < C_; ++c) entry(s.first * P + r, c) = from[r * C_ + c];
    }
  }

  double class_weight(int64_t c) const {
    return in_.class_weight == nullptr ? 1.0 : double(static_cast<const T*>(in_.class_weight)[c]);
  }

  // of_class_[c]: what a partner in class c weighs for an anchor that has it, class weight included.
  void count_classes() {
    Scratch<int64_t> columns(C_ + 1);
    memset(columns.get(), 0, size_t(C_) * sizeof(int64_t));
    for (int segment = in_.include_batch ? kAnchors : kKeys; segment <= kKeys; ++segment) {
      const Segment& s = v_.segments[segment];
      for (int64_t r = 0; r < s.rows; ++r) for_labels(s.first * P + r, [&](int64_t c) { ++columns[c]; });
    }
    for (int64_t c = 0; c < C_; ++c) {
      const int64_t partners = columns[c] - (in_.include_batch ? 1 : 0);
      of_class_[c] = partners > 0 ? T(class_weight(c) / double(partners)) : T(0);
      if (partners <= 0) columns[c] = 0;
    }
    for (int64_t i = 0; i < v_.anchors().rows; ++i)
      for_labels(i, [&](int64_t c) {
        if (columns[c] > 0) lam[i] += class_weight(c), active[i] = 1;
      });
  }

  // Of msc: the terms of anchor i's classes, and lam.
  void count_msc(int64_t i) {
    for_labels(i, [&](int64_t c) { entry(i, c) = 1, active[i] = 1; });
    for_columns(i, [&](int64_t j, int, const typename Simd<T>::I& seen) {
      const Counts c = counts(i, j);
      const vec<T> zero = {}, term = seen ? T(in_.alpha) / at_least_one<T>(c.own + c.theirs - c.both) : zero;
      for_shared(i, j, [&](int64_t k, vec<T> there) { entry(i, k) += sum<T>(term * there); });
    });
    for_labels(i,
               [&](int64_t c) { entry(i, c) = T(class_weight(c) / double(entry(i, c))), lam[i] += class_weight(c); });
  }

  void take_terms(int64_t i, const T* known) {
    for_labels(i, [&](int64_t c) { entry(i, c) = known[c], active[i] = 1, lam[i] += class_weight(c); });
  }

  // Calls f(first lane, segment, lanes that are columns of i) over rows and keys.
  template <class F>
  void for_columns(int64_t i, F f) const {
    for (int segment = in_.include_batch ? kAnchors : kKeys; segment <= kKeys; ++segment) {
      const Segment& s = v_.segments[segment];
      const int64_t first = s.first * P;
      for (int64_t r = 0; r < s.rows; r += L) {
        typename Simd<T>::I seen;
        for (int l = 0; l < L; ++l) seen[l] = r + l < s.rows && (segment != kAnchors || r + l != i) ? -1 : 0;
        f(first + r, segment, seen);
      }
    }
  }

  Vectors<T>& v_;
  const MlcInputs& in_;
  int kind_;
  int64_t C_, words_, rows_;  // rows_: anchors and keys, with their padding
  Scratch<S> has_, ignores_;
  Scratch<T> ones_, unknown_, of_class_, table_;  // table_: msc, [panels][C][P], k_c / m_ic where i has c
  bool some_ignored_ = false;
};

SADCL_KERNELS_END
