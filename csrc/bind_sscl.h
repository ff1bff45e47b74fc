// Bindings of the sample-to-sample loss (sscl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

SsclRows make_rows(const Fields& given, bool normalize) {
  SsclRows rows;
  rows.features = given.tensor("features");
  check_rank("features", rows.features, 4);
  check_floating("features", rows.features);
  const Array pairs = given.tensor("pairs"), class_ptr = given.tensor("class_ptr");
  check_rank("pairs", pairs, 1);
  check_rank("class_ptr", class_ptr, 1);
  rows.pairs = given.buffer<const int32_t>("pairs", kI32, pairs.shape[0]);
  rows.class_ptr = given.buffer<const int32_t>("class_ptr", kI32, class_ptr.shape[0]);
  rows.num_classes = class_ptr.shape[0] - 1;
  rows.capacity = pairs.shape[0];
  rows.temperature = given.temperature();
  rows.normalize = normalize;
  rows.rounded = given.has("rounded") && given.flag("rounded");
  rows.threads = given.threads();

  // A wrong index here would be a read out of bounds there; looking costs a microsecond a thousand.
  const int32_t* ptr = rows.class_ptr;
  const int64_t classes = rows.num_classes;
  if (classes < 0 || ptr[0] != 0 || ptr[classes] > rows.capacity)
    throw py::value_error("class_ptr: expected to start at 0 and end at most at " + std::to_string(rows.capacity));
  for (int64_t k = 0; k < classes; ++k)
    if (ptr[k + 1] < ptr[k])
      throw py::value_error("class_ptr: expected ascending values, see entry " + std::to_string(k + 1));
  const int64_t limit = rows.features.shape[0] * rows.features.shape[2];
  for (int32_t i = 0; i < ptr[classes]; ++i)
    if (rows.pairs[i] < 0 || rows.pairs[i] >= limit)
      throw py::value_error("pairs: expected values in [0, " + std::to_string(limit) + "), got " +
                            std::to_string(rows.pairs[i]));
  return rows;
}

// The statistics that forward and backward share.
template <class Args>
Args make_sscl(const Fields& given, bool normalize) {
  Args a;
  a.rows = make_rows(given, normalize);
  const DType acc = accumulation(a.rows.features);
  const int64_t rows = a.rows.features.shape[1] * a.rows.capacity;
  a.kept_size = count(given.tensor("kept"));
  a.kept = given.buffer("kept", acc, a.kept_size);
  a.lse = given.buffer("lse", acc, 2 * rows);
  a.norm = given.buffer<double>("norm", kF64, rows);
  return a;
}

void bind_sscl_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclForward a = make_sscl<SsclForward>(given, given.flag("normalize"));
  const Array& x = a.rows.features;
  a.released = given.flag("released");
  a.row_loss = given.buffer("row_loss", accumulation(x), x.shape[0] * x.shape[1] * x.shape[2]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.sscl_forward(a);
}

void run_sscl_backward(const Fields& given, SsclBackward& a, const Array& upstream) {
  const Array& x = a.rows.features;
  a.grad_rows = upstream;
  check_shape("grad_row_loss", a.grad_rows, {x.shape[0], x.shape[1], x.shape[2]});
  check_dtype("grad_row_loss", a.grad_rows, accumulation(x));
  a.grad_features = given.tensor("grad_features");
  a.add_to_first = given.has("add_to_first") && given.flag("add_to_first");
  check_dtype("grad_features", a.grad_features, x.dtype);
  check_shape("grad_features", a.grad_features, {x.shape[0], x.shape[1], x.shape[2], x.shape[3]});
  Array by_view = a.grad_features;  // [V, B, C, D]
  std::swap(by_view.shape[0], by_view.shape[1]);
  std::swap(by_view.stride[0], by_view.stride[1]);
  if (!contiguous(by_view) && (a.add_to_first || !contiguous(a.grad_features)))
    throw py::value_error("grad_features: expected contiguous views, or (without add_to_first) a contiguous array");
  const KernelTable& table = kernels();
  double grad_temperature;
  {
    py::gil_scoped_release release;
    grad_temperature = table.sscl_backward(a);
  }
  given.store("grad_temperature", grad_temperature);
}

void bind_sscl_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  SsclBackward a = make_sscl<SsclBackward>(given, given.flag("normalize"));
  run_sscl_backward(given, a, given.tensor("grad_row_loss"));
}

}  // namespace

void bind_sscl(py::module_& m) {
  m.attr("SSCL_FEW_SCORES") = kFewScores;
  m.def("sscl_keep", &sscl_keep, py::arg("n"), py::arg("width"),
        "How many scores of n rows of `width` features are worth keeping; SSCL_FEW_SCORES: up to this many always");
  m.def("sscl_forward", &bind_sscl_forward, "The fields of sadcl.ops.sscl.Inputs and Outputs");
  m.def("sscl_backward", &bind_sscl_backward, "The same fields, grad_row_loss, and grad_ of each input to fill");
}

}  // namespace sadcl
