// Python binding of average_precision.cpp.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "average_precision.h"
#include "fields.h"

namespace sadcl {
namespace {

void bind_average_precision_of(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  const Array scores = given.tensor("scores"), target = given.tensor("target");
  check_rank("scores", scores, 2);
  if (scores.dtype != kF64) check_dtype("scores", scores, kF32);
  check_shape("target", target, {scores.shape[0], scores.shape[1]});
  check_dtype("target", target, kI8);
  double* ap = given.buffer<double>("ap", kF64, scores.shape[1]);
  if (scores.shape[0] >= int64_t(1) << 32) throw py::value_error("scores: expected fewer than 2^32 images");
  const int64_t method = given.integer("method");
  if (method < kVocArea || method > kVoc11) throw py::value_error("method: unknown code " + std::to_string(method));
  const int threads = given.threads();
  py::gil_scoped_release release;
  average_precision({scores, target, ApMethod(method), ap, threads});
}

}  // namespace

void bind_average_precision(py::module_& m) {
  m.def("average_precision", &bind_average_precision_of,
        "The fields of sadcl.ops.average_precision.Inputs and Outputs");
}

}  // namespace sadcl
