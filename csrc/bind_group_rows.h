// Bindings of own rows against columns of all ranks (mlc.cpp, group_rows_sweep.h).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

// The fields of sadcl.portable.group_fused.Block.
template <class Args>
Args make_group_rows(const Fields& given) {
  Args a;
  MlcInputs& in = a.in;
  MlcPeers& peers = a.peers;
  Array own = given.tensor("own");
  check_rank("own", own, 2);
  check_floating("own", own);
  const int64_t R = own.shape[0], D = own.shape[1];
  in.keys = given.tensor("columns");
  check_rank("columns", in.keys, 2);
  check_shape("columns", in.keys, {in.keys.shape[0], D});
  check_dtype("columns", in.keys, own.dtype);
  const int64_t K = in.keys.shape[0];
  in.weighting = int(given.integer("weighting"));
  if (in.weighting < kAll || in.weighting > kIds)
    throw py::value_error("weighting: expected a number in [0, 8], got " + std::to_string(in.weighting));
  int64_t C = 0;
  peers.both = given.has("theirs");
  if (in.weighting == kDense) {
    in.weights = given.tensor("weights");
    check_floating("weights", in.weights);
    check_shape("weights", in.weights, {R, K});
    if (peers.both) {
      peers.weights_back = given.tensor("weights_back");
      check_floating("weights_back", peers.weights_back);
      check_shape("weights_back", peers.weights_back, {R, K});
    }
  } else {
    in.labels = given.tensor("labels"), in.key_labels = given.tensor("column_labels");
    check_rank("labels", in.labels, 2);
    C = in.labels.shape[1];
    check_shape("labels", in.labels, {R, C});
    check_shape("column_labels", in.key_labels, {K, C});
    if (in.weighting == kIds) {
      check_shape("labels", in.labels, {R, 1});
      check_dtype("labels", in.labels, kI32);
      check_dtype("column_labels", in.key_labels, kI32);
    }
  }
  const DType acc = accumulation(own);
  peers.class_share = in.weighting == kMulSupCon ? given.buffer<const void>("class_share", acc, C) : nullptr;
  peers.table = in.weighting == kMsc ? given.buffer<const void>("table", acc, R * C) : nullptr;
  peers.table_back = in.weighting == kMsc && peers.both ? given.buffer<const void>("table_back", acc, K * C) : nullptr;
  peers.own = given.integer("first");
  in.features = own;  // [R, 1, D]
  in.features.dims = 3, in.features.shape[1] = 1, in.features.stride[1] = 0;
  in.features.shape[2] = D, in.features.stride[2] = own.stride[1];
  in.class_weight = nullptr;
  in.include_batch = false, in.normalize = given.flag("normalize");
  in.temperature = given.temperature();
  const double threshold = given.number("threshold");
  if (in.weighting == kJaccard) in.least = LeastShare(threshold, C);
  in.alpha = given.number("alpha"), in.beta = given.number("beta");
  in.threads = given.threads();
  return a;
}

// False if a label is not allowed.
bool bind_group_rows_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  GroupRowsForward a = make_group_rows<GroupRowsForward>(given);
  a.in.peers = &a.peers;
  a.sums = given.buffer<double>("sums", kF64, 5 * a.in.features.shape[0]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.group_rows_forward(a);
}

void bind_group_rows_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  GroupRowsBackward a = make_group_rows<GroupRowsBackward>(given);
  a.in.peers = &a.peers;
  const Array& x = a.in.features;
  const DType acc = accumulation(x);
  const int64_t R = x.shape[0], D = x.shape[2], K = a.in.keys.shape[0];
  a.anchors = given.buffer<const void>("anchors", acc, 4 * R);
  a.columns = given.optional_buffer<const void>("theirs", acc, 4 * K);
  a.gradient = given.buffer("gradient", acc, R * D);
  a.grad_columns = given.optional_buffer("grad_columns", acc, K * D);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.group_rows_backward(a);
}

}  // namespace

void bind_group_rows(py::module_& m) {
  m.def("group_rows_forward", &bind_group_rows_forward,
        "The fields of sadcl.portable.group_fused.Block, sums to fill; False if a label is not allowed");
  m.def("group_rows_backward", &bind_group_rows_backward,
        "The same, anchors, gradient to add to, grad_columns to fill or None");
}

}  // namespace sadcl
