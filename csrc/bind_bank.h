// Python binding of bank.cpp.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bank.h"
#include "bind.h"

namespace sadcl {
namespace {

void bind_bank_update(const Array& slots, const Array& features, const Array& scores, const Array& labels,
                      double threshold, bool probabilities, int threads) {
  check_rank("slots", slots, 3);
  check_rank("features", features, 3);
  check_floating("slots", slots);
  check_floating("features", features);
  const int64_t B = features.shape[0], C = features.shape[1];
  if (B > slots.shape[0])
    throw py::value_error("features: expected at most " + std::to_string(slots.shape[0]) + " images, got shape " + shape_text(features));
  check_shape("features", features, {B, slots.shape[1], slots.shape[2]});
  if (slots.shape[2] > 1 && slots.stride[2] != 1) throw py::value_error("slots: expected contiguous rows");
  if (accumulation(slots) != accumulation(features)) check_dtype("features", features, slots.dtype);
  check_shape("scores", scores, {B, C});
  if (scores.dtype != kF64) check_dtype("scores", scores, kF32);
  check_shape("labels", labels, {B, C});
  py::gil_scoped_release release;
  bank_update({slots, features, scores, labels, threshold, probabilities, threads});
}

}  // namespace

void bind_bank(py::module_& m) {
  m.def("bank_update", &bind_bank_update, py::arg("slots"), py::arg("features"), py::arg("scores"), py::arg("labels"),
        py::arg("threshold"), py::arg("probabilities"), py::arg("threads"));
}

}  // namespace sadcl
