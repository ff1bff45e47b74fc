// Binding of compaction (compact.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include <cmath>
#include <cstdio>

#include "bind.h"
#include "compact.h"

namespace sadcl {
namespace {

void bind_compact_of(const Array& labels, const Array& pairs, const Array& class_ptr, const Array& target, int threads) {
  check_rank("labels", labels, 2);
  const int64_t size = count(labels);
  if (size > INT32_MAX)
    throw py::value_error("labels: expected fewer than 2^31 elements, got shape " + shape_text(labels));
  check_buffer("pairs", pairs, kI32, size);
  check_buffer("class_ptr", class_ptr, kI32, labels.shape[1] + 1);
  check_buffer("target", target, kI8, size);
  constexpr int kShown = 5;
  double bad[kShown + 1];
  int found;
  {
    py::gil_scoped_release release;
    found = compact({labels, static_cast<int32_t*>(pairs.data), static_cast<int32_t*>(class_ptr.data),
                     static_cast<int8_t*>(target.data), threads},
                    bad, kShown + 1);
  }
  if (found == 0) return;
  std::string text = "labels: expected 0, 1 or -1 (ignored), got values ";
  for (int i = 0; i < found && i < kShown; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, "%.9g", bad[i]);
    text += (i ? ", " : "") + std::string(std::isnan(bad[i]) ? "nan" : number);
  }
  throw py::value_error(found > kShown ? text + ", ..." : text);
}

}  // namespace

void bind_compact(py::module_& m) {
  m.def("compact", &bind_compact_of, py::arg("labels"), py::arg("pairs"), py::arg("class_ptr"), py::arg("target"),
        py::arg("threads") = 1);
}

}  // namespace sadcl
