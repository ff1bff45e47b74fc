// Binding of the matrix product (linear.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

void bind_linear_of(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  Linear a;
  a.left = given.tensor("left"), a.right = given.tensor("right");
  check_rank("left", a.left, 2);
  check_rank("right", a.right, 2);
  const int64_t M = a.left.shape[0], K = a.left.shape[1], N = a.right.shape[1];
  const bool wide = a.left.dtype == kF64;
  check_floating("left", a.left);
  check_input("right", a.right, {K, N}, wide);
  a.bias = given.optional("bias");
  if (given.has("bias")) check_input("bias", a.bias, {N}, wide);
  a.out = given.buffer("out", accumulation(a.left), M * N);
  a.threads = given.threads();
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.linear(a);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("linear", &bind_linear_of, "out = left right (+ bias)"); }

}  // namespace sadcl
