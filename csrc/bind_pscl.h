// Bindings of the prototype-to-sample loss (pscl.cpp) and of its mean.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind_mean.h"
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// What forward and backward both take: inputs and statistics.
template <class Args>
Args make_pscl(const Fields& given, bool released) {
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
  a.released = released;
  a.score = given.buffer<double>("score", kF64, B * C);
  a.norm_x = given.buffer<double>("norm_x", kF64, B * C);
  a.norm_p = given.buffer<double>("norm_p", kF64, C);
  a.lse = given.buffer<double>("lse", kF64, 2 * C);
  a.threads = given.threads();
  return a;
}

void bind_pscl_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclForward a = make_pscl<PsclForward>(given, given.flag("released"));
  a.class_loss = given.buffer("class_loss", accumulation(a.features), a.features.shape[1]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.pscl_forward(a);
}

void run_pscl_backward(const Fields& given, PsclBackward& a, const Array& upstream) {
  a.grad_class_loss = upstream;
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

void bind_pscl_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclBackward a = make_pscl<PsclBackward>(given, given.flag("released"));
  run_pscl_backward(given, a, given.tensor("grad_class_loss"));
}

// The mean over the positives, as many as class_ptr [C + 1] says: the same kernels, the mean taken here.
double positives(const Fields& given, const Array& features) {
  const int64_t C = features.shape[1];
  return at_least_one(given.buffer<const int32_t>("class_ptr", kI32, C + 1)[C]);
}

void bind_pscl_mean_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclForward a = make_pscl<PsclForward>(given, false);
  const double count = positives(given, a.features);
  Losses losses(a.features, a.features.shape[1]);
  a.class_loss = losses.data();
  const KernelTable& table = kernels();
  {
    py::gil_scoped_release release;
    table.pscl_forward(a);
  }
  given.store("mean", losses.total() / count);
}

void bind_pscl_mean_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  PsclBackward a = make_pscl<PsclBackward>(given, false);
  const Everywhere upstream(given.scalar("grad_mean") / positives(given, a.features), a.features, 1, 1);
  run_pscl_backward(given, a, upstream.array());
}

}  // namespace

void bind_pscl(py::module_& m) {
  m.def("pscl_forward", &bind_pscl_forward, "The fields of sadcl.ops.pscl.Inputs and Outputs");
  m.def("pscl_backward", &bind_pscl_backward, "The same fields, grad_class_loss, and grad_ of each input to fill");
  m.def("pscl_mean_forward", &bind_pscl_mean_forward, "The fields of sadcl.ops.pscl.MeanInputs and Mean");
  m.def("pscl_mean_backward", &bind_pscl_mean_backward, "The same fields, grad_mean, and grad_ of each input to fill");
}

}  // namespace sadcl
