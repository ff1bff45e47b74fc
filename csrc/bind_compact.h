// Binding of compaction (compact.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include <cmath>
#include <cstdio>

#include "compact.h"
#include "fields.h"

namespace sadcl {
namespace {

void bind_compact_of(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  Compact a;
  a.labels = given.tensor("labels");
  check_rank("labels", a.labels, 2);
  const int64_t size = count(a.labels);
  if (size > INT32_MAX)
    throw py::value_error("labels: expected fewer than 2^31 elements, got shape " + shape_text(a.labels));
  a.pairs = given.buffer<int32_t>("pairs", kI32, size);
  a.class_ptr = given.buffer<int32_t>("class_ptr", kI32, a.labels.shape[1] + 1);
  a.target = given.buffer<int8_t>("target", kI8, size);
  a.threads = given.threads();
  constexpr int kShown = 5;
  double bad[kShown + 1];
  int found;
  {
    py::gil_scoped_release release;
    found = compact(a, bad, kShown + 1);
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
  m.def("compact", &bind_compact_of, "The fields of sadcl.ops.compact.Inputs and Active, for all B * C pairs");
}

}  // namespace sadcl
