// Bindings of the asymmetric loss (asl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// False if a label is not allowed.
bool bind_asl_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  AslForward a;
  a.logits = given.tensor("logits"), a.labels = given.tensor("labels");
  check_rank("logits", a.logits, 2);
  check_floating("logits", a.logits);
  const int64_t B = a.logits.shape[0], C = a.logits.shape[1];
  const DType acc = accumulation(a.logits);
  check_shape("labels", a.labels, {B, C});
  a.class_weight = given.optional_buffer("class_weight", acc, C);
  a.gamma_neg = given.number("gamma_neg"), a.gamma_pos = given.number("gamma_pos");
  a.clip = given.number("clip"), a.eps = given.number("eps");
  a.detach_focal_weight = given.flag("detach_focal_weight");
  a.sum_classes = given.flag("sum_classes");
  a.loss = given.buffer("loss", acc, a.sum_classes ? B : B * C);
  a.slope = given.flag("save") ? given.buffer("slope", acc, B * C) : nullptr;
  a.threads = given.threads();
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.asl_forward(a);
}

void bind_asl_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  AslBackward a;
  a.grad_logits = given.tensor("grad_logits");
  check_rank("grad_logits", a.grad_logits, 2);
  check_floating("grad_logits", a.grad_logits);
  const int64_t B = a.grad_logits.shape[0], C = a.grad_logits.shape[1];
  const DType acc = accumulation(a.grad_logits);
  check_buffer("grad_logits", a.grad_logits, a.grad_logits.dtype, B * C);
  a.slope = given.buffer("slope", acc, B * C);
  a.grad_loss = given.tensor("grad_loss");  // [B] or [B, C]
  check_dtype("grad_loss", a.grad_loss, acc);
  if (a.grad_loss.dims == 1) a.grad_loss.dims = 2, a.grad_loss.shape[1] = C, a.grad_loss.stride[1] = 0;
  check_shape("grad_loss", a.grad_loss, {B, C});
  a.threads = given.threads();
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.asl_backward(a);
}

}  // namespace

void bind_asl(py::module_& m) {
  m.def("asl_forward", &bind_asl_forward,
        "The fields of sadcl.ops.asl.Inputs and Outputs; False if a label is not allowed");
  m.def("asl_backward", &bind_asl_backward, "grad_loss, slope, and grad_logits to fill");
}

}  // namespace sadcl
