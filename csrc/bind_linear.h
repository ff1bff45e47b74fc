// Binding of the matrix product (linear.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

void bind_linear_of(const Array& left, const Array& right, const Array* bias, const Array& out, int threads) {
  check_rank("left", left, 2);
  check_rank("right", right, 2);
  const int64_t M = left.shape[0], K = left.shape[1], N = right.shape[1];
  const bool wide = left.dtype == kF64;
  check_floating("left", left);
  check_input("right", right, {K, N}, wide);
  if (bias != nullptr) check_input("bias", *bias, {N}, wide);
  check_buffer("out", out, accumulation(left), M * N);
  const Linear args = {left, right, bias ? *bias : Array(), out.data, threads};
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.linear(args);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &bind_linear_of, py::arg("left"), py::arg("right"), py::arg("bias").none(true), py::arg("out"),
        py::arg("threads"), "out = left right (+ bias)");
}

}  // namespace sadcl
