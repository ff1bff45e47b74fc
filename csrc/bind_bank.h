// Python binding of bank.cpp.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bank.h"
#include "fields.h"

namespace sadcl {
namespace {

void bind_bank_update(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  BankUpdate a;
  a.slots = given.tensor("slots"), a.features = given.tensor("features");
  a.scores = given.tensor("scores"), a.labels = given.tensor("labels");
  check_rank("slots", a.slots, 3);
  check_rank("features", a.features, 3);
  check_floating("slots", a.slots);
  check_floating("features", a.features);
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  if (B > a.slots.shape[0])
    throw py::value_error("features: expected at most " + std::to_string(a.slots.shape[0]) + " images, got shape " +
                          shape_text(a.features));
  check_shape("features", a.features, {B, a.slots.shape[1], a.slots.shape[2]});
  if (a.slots.shape[2] > 1 && a.slots.stride[2] != 1) throw py::value_error("slots: expected contiguous rows");
  if (accumulation(a.slots) != accumulation(a.features)) check_dtype("features", a.features, a.slots.dtype);
  check_shape("scores", a.scores, {B, C});
  if (a.scores.dtype != kF64) check_dtype("scores", a.scores, kF32);
  check_shape("labels", a.labels, {B, C});
  a.threshold = given.number("threshold");
  a.probabilities = given.flag("probabilities");
  a.threads = given.threads();
  py::gil_scoped_release release;
  bank_update(a);
}

}  // namespace

void bind_bank(py::module_& m) { m.def("bank_update", &bind_bank_update, "The fields of sadcl.ops.bank.Inputs"); }

}  // namespace sadcl
