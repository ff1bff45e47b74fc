// Bindings of the sample-to-sample loss's mean over the active rows: the kernels of bind_sscl.h, the mean taken here.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind_mean.h"
#include "bind_sscl.h"

namespace sadcl {
namespace {

double active_rows(const SsclRows& rows) {
  return at_least_one(rows.class_ptr[rows.num_classes] * rows.features.shape[1]);
}

void bind_sscl_mean_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclForward a = make_sscl<SsclForward>(given, true);
  const Array& x = a.rows.features;
  Losses losses(x, x.shape[0] * x.shape[1] * x.shape[2]);
  a.released = false;
  a.row_loss = losses.data();
  const KernelTable& table = kernels();
  double sum;
  {
    py::gil_scoped_release release;
    table.sscl_forward(a);
    sum = losses.total();
  }
  given.store("mean", sum / active_rows(a.rows));
}

void bind_sscl_mean_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclBackward a = make_sscl<SsclBackward>(given, true);
  const Everywhere upstream(given.scalar("grad_mean") / active_rows(a.rows), a.rows.features, 0, 3);
  run_sscl_backward(given, a, upstream.array());
}

}  // namespace

void bind_sscl_mean(py::module_& m) {
  m.def("sscl_mean_forward", &bind_sscl_mean_forward, "The fields of sadcl.ops.sscl.MeanInputs and Mean");
  m.def("sscl_mean_backward", &bind_sscl_mean_backward, "The same fields, grad_mean, and grad_ of each input to fill");
}

}  // namespace sadcl
