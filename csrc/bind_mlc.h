// Bindings of the image-level multi-label losses (mlc.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// A matrix of a shape, or an array without dimensions where Python says None.
Array matrix(const Fields& given, const char* name, int64_t rows, int64_t columns) {
  if (!given.has(name)) return Array();
  const Array& x = given.tensor(name);
  check_shape(name, x, {rows, columns});
  return x;
}

int64_t rows_of(const Fields& given, const char* name) {
  if (!given.has(name)) return 0;
  check_rank(name, given.tensor(name), 2);
  return given.tensor(name).shape[0];
}

MlcInputs make_mlc(const Fields& given) {
  MlcInputs in;
  in.features = given.tensor("features");
  check_rank("features", in.features, 3);
  check_floating("features", in.features);
  const int64_t B = in.features.shape[0], D = in.features.shape[2], N = B * in.features.shape[1];
  in.weighting = int(given.integer("weighting"));
  if (in.weighting < kAll || in.weighting > kDense)
    throw py::value_error("weighting: expected a number in [0, 7], got " + std::to_string(in.weighting));
  const bool dense = in.weighting == kDense;
  in.include_batch = given.flag("include_batch"), in.normalize = given.flag("normalize");
  const int64_t K = rows_of(given, "keys"), columns = (in.include_batch ? N : 0) + K;
  int64_t C = 0;
  if (!dense) {
    check_rank("labels", given.tensor("labels"), 2);
    C = given.tensor("labels").shape[1];
    in.labels = matrix(given, "labels", B, C);
    if (K > 0) given.tensor("key_labels");
    in.key_labels = matrix(given, "key_labels", K, C);
  } else {
    given.tensor("weights");
    in.weights = matrix(given, "weights", N, columns);
    check_floating("weights", in.weights);
  }
  in.keys = matrix(given, "keys", K, D);
  if (in.weighting == kMsc) given.tensor("prototypes");
  in.prototypes = in.weighting == kMsc ? matrix(given, "prototypes", C, D) : Array();
  for (const Array* x : {&in.keys, &in.prototypes})
    if (x->dims) check_dtype(x == &in.keys ? "keys" : "prototypes", *x, in.features.dtype);
  in.class_weight = given.optional_buffer<const void>("class_weight", accumulation(in.features), C);
  in.temperature = given.temperature();
  const double threshold = given.number("threshold");
  if (in.weighting == kJaccard) in.least = LeastShare(threshold, C);
  in.alpha = given.number("alpha"), in.beta = given.number("beta");
  in.threads = given.threads();
  return in;
}

int64_t vectors(const MlcInputs& in) {
  return in.features.shape[0] * in.features.shape[1] + (in.keys.dims ? in.keys.shape[0] : 0) +
         (in.prototypes.dims ? in.prototypes.shape[0] : 0);
}

// False if a label is not allowed.
bool bind_mlc_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  MlcForward a;
  a.in = make_mlc(given);
  const int64_t N = a.in.features.shape[0] * a.in.features.shape[1];
  a.row_loss = given.buffer("row_loss", accumulation(a.in.features), N);
  a.lse = given.buffer<double>("lse", kF64, N);
  a.norm = given.buffer<double>("norm", kF64, vectors(a.in));
  a.kept_size = given.integer("keep");
  a.kept = given.buffer("kept", accumulation(a.in.features), a.kept_size);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.mlc_forward(a);
}

Array gradient_of(const Fields& given, const char* name, const Array& like) {
  if (!given.has(name) || like.dims == 0) return Array();
  check_buffer(name, given.tensor(name), like.dtype, count(like));
  return given.tensor(name);
}

void bind_mlc_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  MlcBackward a;
  a.in = make_mlc(given);
  const Array& x = a.in.features;
  const int64_t N = x.shape[0] * x.shape[1];
  a.grad_rows = given.tensor("grad_row_loss");
  check_shape("grad_row_loss", a.grad_rows, {x.shape[0], x.shape[1]});
  check_dtype("grad_row_loss", a.grad_rows, accumulation(x));
  a.lse = given.buffer<const double>("lse", kF64, N);
  a.norm = given.buffer<const double>("norm", kF64, vectors(a.in));
  a.kept_size = given.integer("keep");
  a.kept = given.buffer<const void>("kept", accumulation(x), a.kept_size);
  a.grad_features = gradient_of(given, "grad_features", x);
  a.grad_keys = gradient_of(given, "grad_keys", a.in.keys);
  a.grad_prototypes = gradient_of(given, "grad_prototypes", a.in.prototypes);
  const KernelTable& table = kernels();
  double grad_temperature;
  {
    py::gil_scoped_release release;
    grad_temperature = table.mlc_backward(a);
  }
  given.store("grad_temperature", grad_temperature);
}

}  // namespace

void bind_mlc(py::module_& m) {
  m.def("mlc_keep", &mlc_keep, py::arg("n"), py::arg("width"),
        "Numbers that mlc_forward keeps of n anchors and columns");
  m.def("mlc_forward", &bind_mlc_forward,
        "The fields of sadcl.ops.mlc.Inputs and Outputs; False if a label is not allowed");
  m.def("mlc_backward", &bind_mlc_backward,
        "The same without row_loss, grad_row_loss, and grad_ of what is wanted to fill");
}

}  // namespace sadcl
