// Python bindings: check what came, build the argument structs, release the GIL.
//
// No torch headers: tensors arrive as addresses, shapes and strides, so one wheel fits every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdio>
#include <memory>

#include "bind.h"
#include "bind_average_precision.h"
#include "bind_bank.h"
#include "bind_group_classifier.h"
#include "bind_label_attention.h"
#include "bind_losses.h"
#include "dispatch.h"
#include "parallel.h"

namespace sadcl {
namespace {

Array make_array(uintptr_t data, int dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (dtype < kF32 || dtype > kI64) throw py::value_error("Array: unknown dtype code " + std::to_string(dtype));
  if (shape.size() != strides.size() || shape.size() > size_t(kMaxDims))
    throw py::value_error("Array: expected as many strides as sizes and at most " + std::to_string(kMaxDims) +
                          " dimensions, got " + std::to_string(shape.size()) + " sizes and " +
                          std::to_string(strides.size()) + " strides");
  Array a;
  a.data = reinterpret_cast<void*>(data);
  a.dtype = DType(dtype);
  a.dims = int(shape.size());
  for (int d = 0; d < a.dims; ++d) {
    if (shape[d] < 0) throw py::value_error("Array: negative size in shape " + std::to_string(shape[d]));
    a.shape[d] = shape[d];
    a.stride[d] = strides[d];
  }
  return a;
}

SsclRows make_rows(const Array& features, const Array& pairs, const Array& class_ptr, double temperature, bool normalize,
                   int threads) {
  check_rank("features", features, 4);
  if (features.dtype > kF16)
    throw py::type_error(std::string("features: expected a floating dtype, got ") + kDTypeNames[features.dtype]);
  check_rank("pairs", pairs, 1);
  check_buffer("pairs", pairs, kI32, pairs.shape[0]);
  check_rank("class_ptr", class_ptr, 1);
  check_buffer("class_ptr", class_ptr, kI32, class_ptr.shape[0]);
  if (!(temperature > 0 && std::isfinite(temperature)))
    throw py::value_error("temperature: expected a finite number > 0, got " + std::to_string(temperature));

  // A wrong index here would be a read out of bounds there; looking costs a microsecond a thousand.
  const int32_t* ptr = static_cast<const int32_t*>(class_ptr.data);
  const int64_t classes = class_ptr.shape[0] - 1, capacity = pairs.shape[0];
  if (classes < 0 || ptr[0] != 0 || ptr[classes] > capacity)
    throw py::value_error("class_ptr: expected to start at 0 and end at most at " + std::to_string(capacity));
  for (int64_t k = 0; k < classes; ++k)
    if (ptr[k + 1] < ptr[k]) throw py::value_error("class_ptr: expected ascending values, see entry " + std::to_string(k + 1));
  const int64_t limit = features.shape[0] * features.shape[2];
  const int32_t* p = static_cast<const int32_t*>(pairs.data);
  for (int32_t i = 0; i < ptr[classes]; ++i)
    if (p[i] < 0 || p[i] >= limit)
      throw py::value_error("pairs: expected values in [0, " + std::to_string(limit) + "), got " + std::to_string(p[i]));
  return {features, p, ptr, classes, capacity, temperature, normalize, threads};
}

void bind_compact(const Array& labels, const Array& pairs, const Array& class_ptr, const Array& target, int threads) {
  check_rank("labels", labels, 2);
  const int64_t size = count(labels);
  if (size > INT32_MAX)
    throw py::value_error("labels: expected fewer than 2^31 elements, got shape " + shape_text(labels));
  check_buffer("pairs", pairs, kI32, size);
  check_buffer("class_ptr", class_ptr, kI32, labels.shape[1] + 1);
  check_buffer("target", target, kI8, size);
  constexpr int kShown = 5;
  double bad[kShown + 1];
  int found;
  {
    py::gil_scoped_release release;
    found = compact({labels, static_cast<int32_t*>(pairs.data), static_cast<int32_t*>(class_ptr.data),
                     static_cast<int8_t*>(target.data), threads},
                    bad, kShown + 1);
  }
  if (found == 0) return;
  std::string text = "labels: expected 0, 1 or -1 (ignored), got values ";
  for (int i = 0; i < found && i < kShown; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, "%.9g", bad[i]);
    text += (i ? ", " : "") + std::string(std::isnan(bad[i]) ? "nan" : number);
  }
  throw py::value_error(found > kShown ? text + ", ..." : text);
}

void bind_sscl_forward(const Array& features, const Array& pairs, const Array& class_ptr, double temperature,
                       bool normalize, bool released, const Array& row_loss, const Array& lse, const Array& norm,
                       const Array& tile, int threads) {
  SsclForward args;
  args.rows = make_rows(features, pairs, class_ptr, temperature, normalize, threads);
  args.released = released;
  const DType acc = accumulation(features);
  const int64_t rows = features.shape[1] * pairs.shape[0];
  check_buffer("row_loss", row_loss, acc, features.shape[0] * features.shape[1] * features.shape[2]);
  check_buffer("lse", lse, acc, rows);
  check_buffer("norm", norm, kF64, rows);
  check_buffer("tile", tile, acc, count(tile));
  args.row_loss = row_loss.data;
  args.lse = lse.data;
  args.norm = static_cast<double*>(norm.data);
  args.tile = tile.data;
  args.tile_size = count(tile);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.sscl_forward(args);
}

double bind_sscl_backward(const Array& grad_rows, const Array& features, const Array& pairs, const Array& class_ptr,
                          double temperature, const Array& lse, const Array& norm, const Array& tile, bool normalize,
                          const Array& grad_features, bool add_to_first, int threads) {
  SsclBackward args;
  args.rows = make_rows(features, pairs, class_ptr, temperature, normalize, threads);
  const DType acc = accumulation(features);
  const int64_t rows = features.shape[1] * pairs.shape[0];
  check_rank("grad_rows", grad_rows, 3);
  check_dtype("grad_rows", grad_rows, acc);
  for (int d = 0; d < 3; ++d)
    if (grad_rows.shape[d] != features.shape[d])
      throw py::value_error("grad_rows: expected the first three sizes of features " + shape_text(features) +
                            ", got shape " + shape_text(grad_rows));
  check_buffer("lse", lse, acc, rows);
  check_buffer("norm", norm, kF64, rows);
  check_buffer("tile", tile, acc, count(tile));
  check_dtype("grad_features", grad_features, features.dtype);
  check_shape("grad_features", grad_features, {features.shape[0], features.shape[1], features.shape[2], features.shape[3]});
  Array by_view = grad_features;  // [V, B, C, D]
  std::swap(by_view.shape[0], by_view.shape[1]);
  std::swap(by_view.stride[0], by_view.stride[1]);
  if (!contiguous(by_view) && (add_to_first || !contiguous(grad_features)))
    throw py::value_error("grad_features: expected contiguous views, or (without add_to_first) a contiguous array");
  args.grad_rows = grad_rows;
  args.lse = lse.data;
  args.norm = static_cast<const double*>(norm.data);
  args.tile = tile.data;
  args.tile_size = count(tile);
  args.grad_features = grad_features;
  args.add_to_first = add_to_first;
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  return table.sscl_backward(args);
}

void bind_exp2(const Array& x, const Array& out) {
  check_rank("x", x, 1);
  check_buffer("x", x, x.dtype == kF64 ? kF64 : kF32, x.shape[0]);
  check_buffer("out", out, x.dtype, x.shape[0]);
  kernels().exp2(x, out);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = SADCL_COMPILER;
  info["openmp"] = has_openmp();
  info["isas"] = compiled_isas();
  return info;
}

}  // namespace
}  // namespace sadcl

PYBIND11_MODULE(_C, m) {
  using namespace sadcl;
  m.doc() = "CPU kernels of sadcl";
  py::class_<Array>(m, "Array", "A borrowed tensor: address, dtype code, shape, strides in elements")
      .def(py::init(&make_array), py::arg("data_ptr"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
  m.def("isa", [] { return std::string(kernels().isa); }, "Instruction set in use");
  m.def("supported_isas", &supported_isas, "Instruction sets this processor can run, best first");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on (for tests)");
  m.def("build_info", &build_info, "Compiler, OpenMP, instruction sets compiled in");
  m.def("exp2", &bind_exp2, "The contrastive kernels' 2^x (for tests)", py::arg("x"), py::arg("out"));
  m.def("fma_peak", [](int threads) { return kernels().fma_peak(threads); }, py::call_guard<py::gil_scoped_release>(),
        py::arg("threads"), "Measured float32 FLOP/s of independent FMAs (for benchmarks)");
  m.def("compact", &bind_compact, py::arg("labels"), py::arg("pairs"), py::arg("class_ptr"), py::arg("target"),
        py::arg("threads") = 1);
  m.def("sscl_forward", &bind_sscl_forward, py::arg("features"), py::arg("pairs"), py::arg("class_ptr"),
        py::arg("temperature"), py::arg("normalize"), py::arg("released"), py::arg("row_loss"), py::arg("lse"),
        py::arg("norm"), py::arg("tile"), py::arg("threads"));
  m.def("sscl_backward", &bind_sscl_backward, py::arg("grad_rows"), py::arg("features"), py::arg("pairs"),
        py::arg("class_ptr"), py::arg("temperature"), py::arg("lse"), py::arg("norm"), py::arg("tile"),
        py::arg("normalize"), py::arg("grad_features"), py::arg("add_to_first"), py::arg("threads"));
  bind_losses(m);
  bind_label_attention(m);
  bind_group_classifier(m);
  bind_bank(m);
  bind_average_precision(m);
}
