// Bindings of the group-wise classifier (group_classifier.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

template <class Args>
Args make_group_classifier(const Fields& given) {
  Args a;
  a.features = given.tensor("features"), a.weight = given.tensor("weight");
  check_rank("features", a.features, 3);
  check_floating("features", a.features);
  check_floating("weight", a.weight);
  check_shape("weight", a.weight, {a.features.shape[1], a.features.shape[2]});
  if (accumulation(a.weight) != accumulation(a.features)) check_dtype("weight", a.weight, a.features.dtype);
  a.threads = given.threads();
  return a;
}

void bind_group_classifier_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  auto a = make_group_classifier<GroupClassifierForward>(given);
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  a.bias = given.buffer("bias", accumulation(a.features), C);
  a.logits = given.buffer("logits", accumulation(a.features), B * C);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.group_classifier_forward(a);
}

void bind_group_classifier_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  auto a = make_group_classifier<GroupClassifierBackward>(given);
  a.grad_logits = given.tensor("grad_logits");
  check_shape("grad_logits", a.grad_logits, {a.features.shape[0], a.features.shape[1]});
  check_dtype("grad_logits", a.grad_logits, accumulation(a.features));
  a.grad_features = given.optional_buffer("grad_features", a.features.dtype, count(a.features));
  a.grad_weight = given.optional_buffer("grad_weight", a.weight.dtype, count(a.weight));
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.group_classifier_backward(a);
}

}  // namespace

void bind_group_classifier(py::module_& m) {
  m.def("group_classifier_forward", &bind_group_classifier_forward,
        "The fields of sadcl.ops.group_classifier.Inputs and Outputs");
  m.def("group_classifier_backward", &bind_group_classifier_backward,
        "The same fields, grad_logits, and grad_features and grad_weight to fill, or None");
}

}  // namespace sadcl
