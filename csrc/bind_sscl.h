// Bindings of the sample-to-sample loss (sscl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

SsclRows make_rows(const Array& features, const Array& pairs, const Array& class_ptr, double temperature, bool normalize,
                   int threads) {
  check_rank("features", features, 4);
  check_floating("features", features);
  check_rank("pairs", pairs, 1);
  check_buffer("pairs", pairs, kI32, pairs.shape[0]);
  check_rank("class_ptr", class_ptr, 1);
  check_buffer("class_ptr", class_ptr, kI32, class_ptr.shape[0]);
  check_temperature(temperature);

  // A wrong index here would be a read out of bounds there; looking costs a microsecond a thousand.
  const int32_t* ptr = static_cast<const int32_t*>(class_ptr.data);
  const int64_t classes = class_ptr.shape[0] - 1, capacity = pairs.shape[0];
  if (classes < 0 || ptr[0] != 0 || ptr[classes] > capacity)
    throw py::value_error("class_ptr: expected to start at 0 and end at most at " + std::to_string(capacity));
  for (int64_t k = 0; k < classes; ++k)
    if (ptr[k + 1] < ptr[k]) throw py::value_error("class_ptr: expected ascending values, see entry " + std::to_string(k + 1));
  const int64_t limit = features.shape[0] * features.shape[2];
  const int32_t* p = static_cast<const int32_t*>(pairs.data);
  for (int32_t i = 0; i < ptr[classes]; ++i)
    if (p[i] < 0 || p[i] >= limit)
      throw py::value_error("pairs: expected values in [0, " + std::to_string(limit) + "), got " + std::to_string(p[i]));
  return {features, p, ptr, classes, capacity, temperature, normalize, threads};
}

void bind_sscl_forward(const Array& features, const Array& pairs, const Array& class_ptr, double temperature,
                       bool normalize, bool released, const Array& row_loss, const Array& lse, const Array& norm,
                       const Array& kept, int threads) {
  SsclForward args;
  args.rows = make_rows(features, pairs, class_ptr, temperature, normalize, threads);
  args.released = released;
  const DType acc = accumulation(features);
  const int64_t rows = features.shape[1] * pairs.shape[0];
  check_buffer("row_loss", row_loss, acc, features.shape[0] * features.shape[1] * features.shape[2]);
  check_buffer("lse", lse, acc, rows);
  check_buffer("norm", norm, kF64, rows);
  check_buffer("kept", kept, acc, count(kept));
  args.row_loss = row_loss.data;
  args.lse = lse.data;
  args.norm = static_cast<double*>(norm.data);
  args.kept = kept.data;
  args.kept_size = count(kept);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.sscl_forward(args);
}

double bind_sscl_backward(const Array& grad_rows, const Array& features, const Array& pairs, const Array& class_ptr,
                          double temperature, const Array& lse, const Array& norm, const Array& kept, bool normalize,
                          const Array& grad_features, bool add_to_first, int threads) {
  SsclBackward args;
  args.rows = make_rows(features, pairs, class_ptr, temperature, normalize, threads);
  const DType acc = accumulation(features);
  const int64_t rows = features.shape[1] * pairs.shape[0];
  check_rank("grad_rows", grad_rows, 3);
  check_dtype("grad_rows", grad_rows, acc);
  for (int d = 0; d < 3; ++d)
    if (grad_rows.shape[d] != features.shape[d])
      throw py::value_error("grad_rows: expected the first three sizes of features " + shape_text(features) +
                            ", got shape " + shape_text(grad_rows));
  check_buffer("lse", lse, acc, rows);
  check_buffer("norm", norm, kF64, rows);
  check_buffer("kept", kept, acc, count(kept));
  check_dtype("grad_features", grad_features, features.dtype);
  check_shape("grad_features", grad_features, {features.shape[0], features.shape[1], features.shape[2], features.shape[3]});
  Array by_view = grad_features;  // [V, B, C, D]
  std::swap(by_view.shape[0], by_view.shape[1]);
  std::swap(by_view.stride[0], by_view.stride[1]);
  if (!contiguous(by_view) && (add_to_first || !contiguous(grad_features)))
    throw py::value_error("grad_features: expected contiguous views, or (without add_to_first) a contiguous array");
  args.grad_rows = grad_rows;
  args.lse = lse.data;
  args.norm = static_cast<const double*>(norm.data);
  args.kept = kept.data;
  args.kept_size = count(kept);
  args.grad_features = grad_features;
  args.add_to_first = add_to_first;
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.sscl_backward(args);
}

}  // namespace

void bind_sscl(py::module_& m) {
  m.attr("SSCL_FEW_SCORES") = kFewScores;
  m.def("sscl_keep", &sscl_keep, py::arg("n"), py::arg("width"),
        "How many scores of n rows of `width` features are worth keeping; SSCL_FEW_SCORES: up to this many always");
  m.def("sscl_forward", &bind_sscl_forward, py::arg("features"), py::arg("pairs"), py::arg("class_ptr"),
        py::arg("temperature"), py::arg("normalize"), py::arg("released"), py::arg("row_loss"), py::arg("lse"),
        py::arg("norm"), py::arg("kept"), py::arg("threads"));
  m.def("sscl_backward", &bind_sscl_backward, py::arg("grad_rows"), py::arg("features"), py::arg("pairs"),
        py::arg("class_ptr"), py::arg("temperature"), py::arg("lse"), py::arg("norm"), py::arg("kept"),
        py::arg("normalize"), py::arg("grad_features"), py::arg("add_to_first"), py::arg("threads"));
}

}  // namespace sadcl
