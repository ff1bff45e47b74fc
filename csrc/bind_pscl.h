// Bindings of the prototype-to-sample loss (pscl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// What forward and backward both take: inputs and statistics.
template <class Args>
Args make_pscl(const Fields& given) {
  Args a;
  a.features = given.tensor("features"), a.prototypes = given.tensor("prototypes");
  check_rank("features", a.features, 3);
  check_floating("features", a.features);
  check_floating("prototypes", a.prototypes);
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  check_shape("prototypes", a.prototypes, {C, a.features.shape[2]});
  if (accumulation(a.prototypes) != accumulation(a.features)) check_dtype("prototypes", a.prototypes, a.features.dtype);
  a.target = given.buffer<const int8_t>("target", kI8, B * C);
  a.temperature = given.temperature();
  a.released = given.flag("released");
  a.score = given.buffer<double>("score", kF64, B * C);
  a.norm_x = given.buffer<double>("norm_x", kF64, B * C);
  a.norm_p = given.buffer<double>("norm_p", kF64, C);
  a.lse = given.buffer<double>("lse", kF64, 2 * C);
  a.threads = given.threads();
  return a;
}

void bind_pscl_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclForward a = make_pscl<PsclForward>(given);
  a.class_loss = given.buffer("class_loss", accumulation(a.features), a.features.shape[1]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.pscl_forward(a);
}

void bind_pscl_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclBackward a = make_pscl<PsclBackward>(given);
  a.grad_class_loss = given.tensor("grad_class_loss");
  check_shape("grad_class_loss", a.grad_class_loss, {a.features.shape[1]});
  check_dtype("grad_class_loss", a.grad_class_loss, accumulation(a.features));
  a.grad_features = given.buffer("grad_features", a.features.dtype, count(a.features));
  a.grad_prototypes = given.buffer("grad_prototypes", a.prototypes.dtype, count(a.prototypes));
  const KernelTable& table = kernels();
  double grad_temperature;
  {
    py::gil_scoped_release release;
    grad_temperature = table.pscl_backward(a);
  }
  given.store("grad_temperature", grad_temperature);
}

}  // namespace

void bind_pscl(py::module_& m) {
  m.def("pscl_forward", &bind_pscl_forward, "The fields of sadcl.ops.pscl.Inputs and Outputs");
  m.def("pscl_backward", &bind_pscl_backward, "The same fields, grad_class_loss, and grad_ of each input to fill");
}

}  // namespace sadcl
