// Bindings of ZLPR (zlpr.cpp) and of the two-way loss (two_way.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// Logits and labels, checked.
void take_logits(const Fields& given, Array& logits, Array& labels) {
  logits = given.tensor("logits"), labels = given.tensor("labels");
  check_rank("logits", logits, 2);
  check_floating("logits", logits);
  check_shape("labels", labels, {logits.shape[0], logits.shape[1]});
}

Array take_grad_logits(const Fields& given, const Array& logits) {
  const Array& out = given.tensor("grad_logits");
  check_buffer("grad_logits", out, logits.dtype, count(logits));
  check_shape("grad_logits", out, {logits.shape[0], logits.shape[1]});
  return out;
}

// An upstream gradient; an array without dimensions where nobody used the result.
Array take_upstream(const Fields& given, const char* name, int64_t size, DType acc) {
  if (!given.has(name)) return Array();
  const Array& grad = given.tensor(name);
  check_dtype(name, grad, acc);
  check_shape(name, grad, {size});
  return grad;
}

// False if a label is not allowed.
bool bind_zlpr_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  ZlprForward a;
  take_logits(given, a.logits, a.labels);
  const int64_t B = a.logits.shape[0];
  a.row_loss = given.buffer("row_loss", accumulation(a.logits), B);
  a.lse = given.buffer<double>("lse", kF64, 2 * B);
  a.threads = given.threads();
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.zlpr_forward(a);
}

void bind_zlpr_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  ZlprBackward a;
  take_logits(given, a.logits, a.labels);
  a.lse = given.buffer<const double>("lse", kF64, 2 * a.logits.shape[0]);
  given.tensor("grad_row_loss");
  a.grad_rows = take_upstream(given, "grad_row_loss", a.logits.shape[0], accumulation(a.logits));
  a.grad_logits = take_grad_logits(given, a.logits);
  a.threads = given.threads();
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.zlpr_backward(a);
}

TwoWayInputs make_two_way(const Fields& given) {
  TwoWayInputs in;
  take_logits(given, in.logits, in.labels);
  in.positive_temperature = given.number("positive_temperature");
  in.negative_temperature = given.number("negative_temperature");
  in.threads = given.threads();
  return in;
}

// False if a label is not allowed.
bool bind_two_way_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  TwoWayForward a;
  a.in = make_two_way(given);
  const int64_t B = a.in.logits.shape[0], C = a.in.logits.shape[1];
  a.row_loss = given.buffer("row_loss", accumulation(a.in.logits), B);
  a.class_loss = given.buffer("class_loss", accumulation(a.in.logits), C);
  a.row_lse = given.buffer<double>("row_lse", kF64, 2 * B);
  a.class_lse = given.buffer<double>("class_lse", kF64, 2 * C);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.two_way_forward(a);
}

void bind_two_way_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  TwoWayBackward a;
  a.in = make_two_way(given);
  const int64_t B = a.in.logits.shape[0], C = a.in.logits.shape[1];
  const DType acc = accumulation(a.in.logits);
  a.grad_rows = take_upstream(given, "grad_row_loss", B, acc);
  a.grad_classes = take_upstream(given, "grad_class_loss", C, acc);
  a.row_lse = given.buffer<const double>("row_lse", kF64, 2 * B);
  a.class_lse = given.buffer<const double>("class_lse", kF64, 2 * C);
  a.grad_logits = take_grad_logits(given, a.in.logits);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.two_way_backward(a);
}

}  // namespace

void bind_zlpr(py::module_& m) {
  m.def("zlpr_forward", &bind_zlpr_forward,
        "The fields of sadcl.ops.zlpr.Inputs and Outputs; False if a label is not allowed");
  m.def("zlpr_backward", &bind_zlpr_backward, "The same without row_loss, grad_row_loss, and grad_logits to fill");
  m.def("two_way_forward", &bind_two_way_forward,
        "The fields of sadcl.ops.two_way.Inputs and Outputs; False if a label is not allowed");
  m.def("two_way_backward", &bind_two_way_backward,
        "The same without losses, grad_ of each loss, and grad_logits to fill");
}

}  // namespace sadcl
