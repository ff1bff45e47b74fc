// Average precision of each class: a stable radix sort by falling score, then one walk over the ranking.
//
// Compiled once, with the base instruction set: sorting is bound by latency, not by arithmetic. Ignored pairs are left
// out before the sort; ties keep the order of the images, as a stable sort would have it.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "average_precision.h"
#include "parallel.h"

namespace sadcl {
namespace {

// Unsigned keys that ascend as the scores fall. -0 counts as 0.
uint32_t falling(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
uint64_t falling(double score) {
  score += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

// One class: keys and "is positive" of its pairs, and a second pair of buffers for the sort.
template <class K>
struct Ranking {
  static constexpr int kBits = 11, kBins = 1 << kBits, kPasses = (sizeof(K) * 8 + kBits - 1) / kBits;
  K *keys, *other_keys;
  uint8_t *hits, *other_hits;
  int64_t n;

  // Least significant digit first; a digit that all keys share costs nothing.
  void sort() {
    static_assert(kPasses <= 6, "room for the counts");
    uint32_t counts[kPasses][kBins] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int p = 0; p < kPasses; ++p) ++counts[p][keys[i] >> (p * kBits) & (kBins - 1)];
    for (int p = 0; p < kPasses; ++p) {
      uint32_t* place = counts[p];
      if (n == 0 || int64_t(place[keys[0] >> (p * kBits) & (kBins - 1)]) == n) continue;
      uint32_t total = 0;
      for (int bin = 0; bin < kBins; ++bin) {
        const uint32_t here = place[bin];
        place[bin] = total;
        total += here;
      }
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t to = place[keys[i] >> (p * kBits) & (kBins - 1)]++;
        other_keys[to] = keys[i];
        other_hits[to] = hits[i];
      }
      std::swap(keys, other_keys);
      std::swap(hits, other_hits);
    }
  }

  // Mean over the positives of the precision at the end of their group of equal scores.
  double tied(int64_t positives) const {
    double sum = 0;
    int64_t found = 0;
    for (int64_t i = 0; i < n;) {
      int64_t end = i, group = 0;
      for (; end < n && keys[end] == keys[i]; ++end) group += hits[end];
      found += group;
      if (group) sum += double(group) * (double(found) / double(end));
      i = end;
    }
    return sum / double(positives);
  }

  // envelope[k]: the largest precision at the k-th positive (from 0) or after it.
  void envelope(std::vector<double>& envelope) const {
    envelope.clear();
    for (int64_t i = 0; i < n; ++i)
      if (hits[i]) envelope.push_back(double(envelope.size() + 1) / double(i + 1));
    for (size_t k = envelope.size(); k-- > 1;)
      if (envelope[k] > envelope[k - 1]) envelope[k - 1] = envelope[k];
  }

  double average_precision(ApMethod method, std::vector<double>& curve) {
    int64_t positives = 0;
    for (int64_t i = 0; i < n; ++i) positives += hits[i];
    if (positives == 0) return std::numeric_limits<double>::quiet_NaN();
    sort();
    if (method == kSklearn) return tied(positives);
    envelope(curve);
    double sum = 0;
    if (method == kVocArea) {
      for (int64_t k = positives; k-- > 0;) sum += curve[size_t(k)];
      return sum / double(positives);
    }
    for (int64_t tenth = 0; tenth <= 10;
         ++tenth) {  // recall reaches tenth / 10 with positive number ceil(tenth M / 10)
      const int64_t number = (tenth * positives + 9) / 10;
      sum += curve[size_t(number > 0 ? number - 1 : 0)];
    }
    return sum / 11;
  }
};

// Classes are read `width` at a time, so that a cache line of a row serves several of them.
template <class T, class K>
void all_classes(const Array& scores, const Array& target, ApMethod method, double* ap, int threads) {
  const int64_t n = scores.shape[0], C = scores.shape[1];
  const int team = n * C < 1 << 13 ? 1 : team_size(threads);
  int64_t width = C / team < 8 ? C / team : 8;
  while (width > 1 && width * n > int64_t(1) << 22) width /= 2;  // 16 MB of keys at most
  if (width < 1) width = 1;
  std::vector<std::vector<K>> keys(static_cast<size_t>(team));
  std::vector<std::vector<uint8_t>> hits(static_cast<size_t>(team));
  std::vector<std::vector<double>> curves(static_cast<size_t>(team));
  for (int t = 0; t < team; ++t) {
    keys[size_t(t)].resize(size_t((width + 1) * n));
    hits[size_t(t)].resize(size_t((width + 1) * n));
    curves[size_t(t)].reserve(size_t(n));
  }
  const int64_t blocks = (C + width - 1) / width;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const size_t t = size_t(thread_index());
    const int64_t first = block * width, count = C - first < width ? C - first : width;
    int64_t sizes[8] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < count; ++k) {
        const int8_t label =
            static_cast<const int8_t*>(target.data)[i * target.stride[0] + (first + k) * target.stride[1]];
        const T score = static_cast<const T*>(scores.data)[i * scores.stride[0] + (first + k) * scores.stride[1]];
        const size_t to = size_t(k * n + sizes[k]);
        keys[t][to] = falling(score);
        hits[t][to] = label == 1;
        sizes[k] += label >= 0;  // an ignored pair is overwritten by the next
      }
    for (int64_t k = 0; k < count; ++k) {
      Ranking<K> ranking = {&keys[t][size_t(k * n)], &keys[t][size_t(width * n)], &hits[t][size_t(k * n)],
                            &hits[t][size_t(width * n)], sizes[k]};
      ap[first + k] = ranking.average_precision(method, curves[t]);
    }
  }
}

}  // namespace

void average_precision(const AveragePrecision& a) {
  double* out = a.ap;
  if (a.scores.shape[0] == 0) {
    for (int64_t c = 0; c < a.scores.shape[1]; ++c) out[c] = std::numeric_limits<double>::quiet_NaN();
  } else if (a.scores.dtype == kF64) {
    all_classes<double, uint64_t>(a.scores, a.target, a.method, out, a.threads);
  } else {
    all_classes<float, uint32_t>(a.scores, a.target, a.method, out, a.threads);
  }
}

}  // namespace sadcl
