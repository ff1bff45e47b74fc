// Bindings of the sample-to-sample loss's mean over the active rows: the kernels of bind_sscl.h, the mean taken here.
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind_sscl.h"

namespace sadcl {
namespace {

int64_t active_rows(const SsclRows& rows) {
  const int64_t n = rows.class_ptr[rows.num_classes] * rows.features.shape[1];
  return n > 0 ? n : 1;
}

template <class T>
double total(const T* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]);
  return sum;
}

void bind_sscl_mean_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclForward a = make_sscl<SsclForward>(given, true);
  const Array& x = a.rows.features;
  const int64_t size = x.shape[0] * x.shape[1] * x.shape[2];
  const bool wide = x.dtype == kF64;
  a.released = false;
  std::vector<double> room(size_t(wide ? size : size / 2 + 1));
  a.row_loss = room.data();
  const KernelTable& table = kernels();
  double sum;
  {
    py::gil_scoped_release release;
    table.sscl_forward(a);
    sum = wide ? total(room.data(), size) : total(reinterpret_cast<const float*>(room.data()), size);
  }
  given.store("mean", sum / double(active_rows(a.rows)));
}

void bind_sscl_mean_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclBackward a = make_sscl<SsclBackward>(given, true);
  const Array& x = a.rows.features;
  const double one = given.scalar("grad_mean") / double(active_rows(a.rows));
  const float narrow = float(one);
  Array upstream;  // the same number at every row
  upstream.data = x.dtype == kF64 ? const_cast<void*>(static_cast<const void*>(&one))
                                  : const_cast<void*>(static_cast<const void*>(&narrow));
  upstream.dtype = accumulation(x);
  upstream.dims = 3;
  for (int d = 0; d < 3; ++d) upstream.shape[d] = x.shape[d], upstream.stride[d] = 0;
  run_sscl_backward(given, a, upstream);
}

}  // namespace

void bind_sscl_mean(py::module_& m) {
  m.def("sscl_mean_forward", &bind_sscl_mean_forward, "The fields of sadcl.ops.sscl.MeanInputs and Mean");
  m.def("sscl_mean_backward", &bind_sscl_mean_backward, "The same fields, grad_mean, and grad_ of each input to fill");
}

}  // namespace sadcl
