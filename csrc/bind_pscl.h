// Bindings of the prototype-to-sample loss (pscl.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

// Sizes and dtypes of what forward and backward both take.
void check_pscl(const Array& features, const Array& prototypes, const Array& target, double temperature,
                const Array& score, const Array& norm_x, const Array& norm_p, const Array& lse) {
  check_rank("features", features, 3);
  check_floating("features", features);
  check_floating("prototypes", prototypes);
  const int64_t B = features.shape[0], C = features.shape[1];
  check_shape("prototypes", prototypes, {C, features.shape[2]});
  if (accumulation(prototypes) != accumulation(features)) check_dtype("prototypes", prototypes, features.dtype);
  check_buffer("target", target, kI8, B * C);
  check_temperature(temperature);
  check_buffer("score", score, kF64, B * C);
  check_buffer("norm_x", norm_x, kF64, B * C);
  check_buffer("norm_p", norm_p, kF64, C);
  check_buffer("lse", lse, kF64, 2 * C);
}

double* doubles(const Array& a) { return static_cast<double*>(a.data); }

void bind_pscl_forward(const Array& features, const Array& prototypes, const Array& target, double temperature,
                       bool released, const Array& class_loss, const Array& score, const Array& norm_x,
                       const Array& norm_p, const Array& lse, int threads) {
  check_pscl(features, prototypes, target, temperature, score, norm_x, norm_p, lse);
  check_buffer("class_loss", class_loss, accumulation(features), features.shape[1]);
  const PsclForward args = {features,        prototypes,     static_cast<const int8_t*>(target.data), temperature, released,
                            class_loss.data, doubles(score), doubles(norm_x), doubles(norm_p), doubles(lse), threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.pscl_forward(args);
}

double bind_pscl_backward(const Array& grad_class, const Array& features, const Array& prototypes, const Array& target,
                          double temperature, const Array& score, const Array& norm_x, const Array& norm_p,
                          const Array& lse, bool released, const Array& grad_features, const Array& grad_prototypes,
                          int threads) {
  check_pscl(features, prototypes, target, temperature, score, norm_x, norm_p, lse);
  check_shape("grad_class", grad_class, {features.shape[1]});
  check_dtype("grad_class", grad_class, accumulation(features));
  check_buffer("grad_features", grad_features, features.dtype, count(features));
  check_buffer("grad_prototypes", grad_prototypes, prototypes.dtype, count(prototypes));
  const PsclBackward args = {grad_class, features, prototypes, static_cast<const int8_t*>(target.data), temperature, released,
                             doubles(score), doubles(norm_x), doubles(norm_p), doubles(lse),
                             grad_features.data, grad_prototypes.data, threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.pscl_backward(args);
}

}  // namespace

void bind_pscl(py::module_& m) {
  m.def("pscl_forward", &bind_pscl_forward, py::arg("features"), py::arg("prototypes"), py::arg("target"),
        py::arg("temperature"), py::arg("released"), py::arg("class_loss"), py::arg("score"), py::arg("norm_x"),
        py::arg("norm_p"), py::arg("lse"), py::arg("threads"));
  m.def("pscl_backward", &bind_pscl_backward, py::arg("grad_class"), py::arg("features"), py::arg("prototypes"),
        py::arg("target"), py::arg("temperature"), py::arg("score"), py::arg("norm_x"), py::arg("norm_p"), py::arg("lse"),
        py::arg("released"), py::arg("grad_features"), py::arg("grad_prototypes"), py::arg("threads"),
        "Fills both gradients, returns that of the temperature");
}

}  // namespace sadcl
