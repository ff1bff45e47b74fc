// Memory-bank update: copies the label features of confidently and correctly recognised pairs.
//
// Compiled once, with the base instruction set: rows are copied, at most converted.
#include "bank.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bank_formula.h"
#include "convert.h"
#include "parallel.h"

namespace sadcl {
namespace {

using namespace SADCL_ISA;

template <class T>
T at(const Array& a, int64_t b, int64_t c) {
  return static_cast<const T*>(a.data)[b * a.stride[0] + c * a.stride[1]];
}

// Appends b * C + c of every label that equals `one`.
template <class T>
void append_ones(const Array& labels, T one, std::vector<int64_t>& found) {
  const int64_t B = labels.shape[0], C = labels.shape[1], stride = labels.stride[1];
  for (int64_t b = 0; b < B; ++b) {
    const T* row = static_cast<const T*>(labels.data) + b * labels.stride[0];
    for (int64_t c = 0; c < C; ++c)
      if (row[c * stride] == one) found.push_back(b * C + c);
  }
}

std::vector<int64_t> positives(const Array& labels) {
  std::vector<int64_t> found;
  switch (labels.dtype) {
    case kF32: append_ones<float>(labels, 1, found); break;
    case kF64: append_ones<double>(labels, 1, found); break;
    case kBF16: append_ones<uint16_t>(labels, 0x3f80, found); break;
    case kF16: append_ones<uint16_t>(labels, 0x3c00, found); break;
    case kU8: append_ones<uint8_t>(labels, 1, found); break;
    case kI8: append_ones<int8_t>(labels, 1, found); break;
    case kI16: append_ones<int16_t>(labels, 1, found); break;
    case kI32: append_ones<int32_t>(labels, 1, found); break;
    default: append_ones<int64_t>(labels, 1, found); break;
  }
  return found;
}

bool exceeds(const BankUpdate& a, int64_t b, int64_t c) {
  const bool wide = a.scores.dtype == kF64;
  const double score = wide ? at<double>(a.scores, b, c) : at<float>(a.scores, b, c);
  return bank_exceeds(score, wide, a.probabilities, a.threshold);
}

template <class T>
void copy_row(const BankUpdate& a, int64_t b, int64_t c) {
  constexpr int64_t kBlock = 512;
  T buffer[kBlock];
  const Array &to = a.slots, &from = a.features;
  const int64_t E = to.shape[2], stride = from.stride[2];
  const int64_t source = b * from.stride[0] + c * from.stride[1], target = b * to.stride[0] + c * to.stride[1];
  const int64_t size = element_size(to.dtype);
  if (from.dtype == to.dtype && stride == 1) {
    memcpy(static_cast<char*>(to.data) + target * size, static_cast<const char*>(from.data) + source * size,
           size_t(E * size));
    return;
  }
  for (int64_t e = 0; e < E; e += kBlock) {
    const int64_t n = E - e < kBlock ? E - e : kBlock;
    read_row(from, source + e * stride, stride, n, buffer);
    write_row(to.data, to.dtype, target + e, n, buffer);
  }
}

}  // namespace

void bank_update(const BankUpdate& a) {
  const int64_t C = a.features.shape[1];
  std::vector<int64_t> found = positives(a.labels);
  found.erase(std::remove_if(found.begin(), found.end(), [&](int64_t i) { return !exceeds(a, i / C, i % C); }),
              found.end());
  const int64_t count = int64_t(found.size());
  [[maybe_unused]] const int threads = count * a.slots.shape[2] < 1 << 15 ? 1 : team_size(a.threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = found[size_t(i)] / C, c = found[size_t(i)] % C;
    a.slots.dtype == kF64 ? copy_row<double>(a, b, c) : copy_row<float>(a, b, c);
  }
}

}  // namespace sadcl
