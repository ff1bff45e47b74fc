// Bindings of the asymmetric loss (asl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

bool bind_asl_forward(const Array& logits, const Array& labels, const Array* class_weight, double gamma_neg,
                      double gamma_pos, double clip, double eps, bool detach_focal_weight, const Array& loss,
                      const Array& grad, int threads) {
  check_rank("logits", logits, 2);
  check_floating("logits", logits);
  const int64_t B = logits.shape[0], C = logits.shape[1];
  const DType acc = accumulation(logits);
  check_shape("labels", labels, {B, C});
  if (class_weight != nullptr) check_buffer("class_weight", *class_weight, acc, C);
  const bool sum_classes = loss.dims == 1;
  check_buffer("loss", loss, acc, sum_classes ? B : B * C);
  check_buffer("grad", grad, acc, count(grad) == 0 ? 0 : B * C);
  const AslForward args = {logits,    labels, class_weight ? class_weight->data : nullptr,
                           gamma_neg, gamma_pos, clip, eps, detach_focal_weight, sum_classes,
                           loss.data, count(grad) == 0 ? nullptr : grad.data, threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.asl_forward(args);
}

void bind_asl_backward(const Array& grad_loss, const Array& grad, const Array& grad_logits, int threads) {
  check_rank("grad_logits", grad_logits, 2);
  check_floating("grad_logits", grad_logits);
  const int64_t B = grad_logits.shape[0], C = grad_logits.shape[1];
  const DType acc = accumulation(grad_logits);
  check_dtype("grad_loss", grad_loss, acc);
  check_buffer("grad", grad, acc, B * C);
  check_buffer("grad_logits", grad_logits, grad_logits.dtype, B * C);
  Array upstream = grad_loss;  // [B] or [B, C]
  if (upstream.dims == 1) upstream.dims = 2, upstream.shape[1] = C, upstream.stride[1] = 0;
  check_shape("grad_loss", upstream, {B, C});
  const AslBackward args = {upstream, grad.data, grad_logits, threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.asl_backward(args);
}

}  // namespace

void bind_asl(py::module_& m) {
  m.def("asl_forward", &bind_asl_forward, py::arg("logits"), py::arg("labels"), py::arg("class_weight").none(true),
        py::arg("gamma_neg"), py::arg("gamma_pos"), py::arg("clip"), py::arg("eps"), py::arg("detach_focal_weight"),
        py::arg("loss"), py::arg("grad"), py::arg("threads"),
        "Loss [B, C], or [B] if `loss` has one dimension; no derivative if `grad` is empty; False if a label is not allowed");
  m.def("asl_backward", &bind_asl_backward, py::arg("grad_loss"), py::arg("grad"), py::arg("grad_logits"),
        py::arg("threads"));
}

}  // namespace sadcl
