// Bindings of the group-wise classifier (group_classifier.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

void check_inputs(const Array& features, const Array& weight) {
  check_rank("features", features, 3);
  check_floating("features", features);
  check_floating("weight", weight);
  check_shape("weight", weight, {features.shape[1], features.shape[2]});
  if (accumulation(weight) != accumulation(features)) check_dtype("weight", weight, features.dtype);
}

void bind_group_classifier_forward(const Array& features, const Array& weight, const Array& bias, const Array& logits, int threads) {
  check_inputs(features, weight);
  const int64_t B = features.shape[0], C = features.shape[1];
  check_buffer("bias", bias, accumulation(features), C);
  check_buffer("logits", logits, accumulation(features), B * C);
  const GroupClassifierForward args = {features, weight, bias.data, logits.data, threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.group_classifier_forward(args);
}

void bind_group_classifier_backward(const Array& grad_logits, const Array& features, const Array& weight, const Array* grad_features,
                   const Array* grad_weight, int threads) {
  check_inputs(features, weight);
  check_shape("grad_logits", grad_logits, {features.shape[0], features.shape[1]});
  check_dtype("grad_logits", grad_logits, accumulation(features));
  if (grad_features) check_buffer("grad_features", *grad_features, features.dtype, count(features));
  if (grad_weight) check_buffer("grad_weight", *grad_weight, weight.dtype, count(weight));
  const GroupClassifierBackward args = {grad_logits,
                                        features,
                                        weight,
                                        grad_features ? grad_features->data : nullptr,
                                        grad_weight ? grad_weight->data : nullptr,
                                        threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.group_classifier_backward(args);
}

}  // namespace

void bind_group_classifier(py::module_& m) {
  m.def("group_classifier_forward", &bind_group_classifier_forward, py::arg("features"), py::arg("weight"), py::arg("bias"),
        py::arg("logits"), py::arg("threads"));
  m.def("group_classifier_backward", &bind_group_classifier_backward, py::arg("grad_logits"), py::arg("features"), py::arg("weight"),
        py::arg("grad_features").none(true), py::arg("grad_weight").none(true), py::arg("threads"),
        "None for a gradient that is not wanted");
}

}  // namespace sadcl
