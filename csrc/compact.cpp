// Compaction: multi-hot labels [B, C] to class-major active pairs (CSR) and canonical labels.
//
// Compiled once, with the compiler's base instruction set: it is bound by memory. The labels are read once, row by row
// as they lie in memory, whatever their type; that pass writes the canonical int8 labels and counts each class. The
// second pass reads the int8 labels, eight at a time, and stops only where one is positive.
#include "compact.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace sadcl {
namespace {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class T>
double number(T x) {
  return double(x);
}
double number(Brain x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
double number(Half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  double size = exponent == 31 ? (mantissa ? __builtin_nan("") : __builtin_inf())
                               : __builtin_ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
  return x.bits & 0x8000 ? -size : size;
}

// -1, 0, 1, or 2 for anything else. Comparisons only, so that the loops over it vectorise; NaN fails all three.
template <class T>
int8_t canonical(T x) {
  const int8_t one = x == T(1), zero = x == T(0);
  const int8_t ignored = T(-1) < T(0) && x == T(-1);  // unsigned types have no -1
  return int8_t(2 - one - 2 * zero - 3 * ignored);
}
int8_t canonical(Half x) {
  const int8_t one = x.bits == 0x3c00, zero = (x.bits & 0x7fff) == 0, ignored = x.bits == 0xbc00;
  return int8_t(2 - one - 2 * zero - 3 * ignored);
}
int8_t canonical(Brain x) {
  const int8_t one = x.bits == 0x3f80, zero = (x.bits & 0x7fff) == 0, ignored = x.bits == 0xbf80;
  return int8_t(2 - one - 2 * zero - 3 * ignored);
}

template <class T>
void canonical_row(const T* x, int64_t stride, int64_t n, int8_t* out) {
  if (stride == 1) {
    for (int64_t c = 0; c < n; ++c) out[c] = canonical(x[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) out[c] = canonical(x[c * stride]);
  }
}

bool is_positive(int8_t label) { return label == 1; }

// Calls f(c) for every positive of a row. Positives are rare: whole words without one are skipped. A canonical label
// has bit 0 set and bit 1 clear only if it is 1 (-1 has both, 2 only bit 1).
template <class F>
void for_positives(const int8_t* row, int64_t n, F f) {
  int64_t c = 0;
  for (; c + 8 <= n; c += 8) {
    uint64_t word;
    std::memcpy(&word, row + c, 8);
    if ((word & ~(word >> 1) & 0x0101010101010101u) == 0) continue;
    for (int i = 0; i < 8; ++i)
      if (is_positive(row[c + i])) f(c + i);
  }
  for (; c < n; ++c)
    if (is_positive(row[c])) f(c);
}

template <class T>
void collect_bad(const Compact& args, double* bad, int max_bad, int& count) {
  const Array& y = args.labels;
  const int64_t B = y.shape[0], C = y.shape[1];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C && count < max_bad; ++c) {
      if (args.target[b * C + c] != 2) continue;
      const double value = number(static_cast<const T*>(y.data)[b * y.stride[0] + c * y.stride[1]]);
      bool seen = false;
      for (int i = 0; i < count; ++i) seen = seen || bad[i] == value || (bad[i] != bad[i] && value != value);
      if (!seen) bad[count++] = value;
    }
}

// Rows [first, last) of thread `t` in a team of `team`.
struct Share {
  int64_t first, last;
  Share(int64_t rows, int t, int team) : first(rows * t / team), last(rows * (t + 1) / team) {}
};

template <class T>
int compact_as(const Compact& args, double* bad, int max_bad) {
  const Array& y = args.labels;
  const int64_t B = y.shape[0], C = y.shape[1];
  int team = team_size(args.threads);
  if (B * C < 1 << 15) team = 1;
  if (team > B) team = B > 0 ? int(B) : 1;
  std::vector<int32_t> next(size_t(team) * C, 0);  // first each share's counts of a class, then where its pairs go
  std::vector<uint8_t> invalid(size_t(team), 0);

#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int t = 0; t < team; ++t) {
    const Share share(B, t, team);
    int32_t* counts = next.data() + t * C;
    uint8_t found = 0;
    for (int64_t b = share.first; b < share.last; ++b) {
      int8_t* row = args.target + b * C;
      canonical_row(static_cast<const T*>(y.data) + b * y.stride[0], y.stride[1], C, row);
      uint8_t bits = 0;  // of all labels other than -1: bit 1 tells an invalid one
      for (int64_t c = 0; c < C; ++c) bits |= uint8_t(row[c] & ~(row[c] >> 7));
      found |= bits;
      for_positives(row, C, [&](int64_t c) { ++counts[c]; });
    }
    invalid[t] = found >> 1;
  }
  int count = 0;
  for (int t = 0; t < team; ++t)
    if (invalid[t] && count == 0) collect_bad<T>(args, bad, max_bad, count);
  if (count > 0) return count;

  int32_t total = 0;
  for (int64_t c = 0; c < C; ++c) {
    args.class_ptr[c] = total;
    for (int t = 0; t < team; ++t) {
      const int32_t n = next[t * C + c];
      next[t * C + c] = total;
      total += n;
    }
  }
  args.class_ptr[C] = total;

#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int t = 0; t < team; ++t) {
    const Share share(B, t, team), rest(B * C - total, t, team);
    int32_t* to = next.data() + t * C;
    for (int64_t b = share.first; b < share.last; ++b)
      for_positives(args.target + b * C, C, [&](int64_t c) { args.pairs[to[c]++] = int32_t(b * C + c); });
    std::memset(args.pairs + total + rest.first, 0, size_t(rest.last - rest.first) * sizeof(int32_t));
  }
  return 0;
}

}  // namespace

int compact(const Compact& args, double* bad, int max_bad) {
  switch (args.labels.dtype) {
    case kF32: return compact_as<float>(args, bad, max_bad);
    case kF64: return compact_as<double>(args, bad, max_bad);
    case kBF16: return compact_as<Brain>(args, bad, max_bad);
    case kF16: return compact_as<Half>(args, bad, max_bad);
    case kU8: return compact_as<uint8_t>(args, bad, max_bad);
    case kI8: return compact_as<int8_t>(args, bad, max_bad);
    case kI16: return compact_as<int16_t>(args, bad, max_bad);
    case kI32: return compact_as<int32_t>(args, bad, max_bad);
    default: return compact_as<int64_t>(args, bad, max_bad);
  }
}

}  // namespace sadcl
