// Python bindings: check what came, build the argument structs, release the GIL.
//
// No torch headers: tensors arrive as addresses, shapes and strides, so one wheel fits every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "bind_asl.h"
#include "bind_average_precision.h"
#include "bind_bank.h"
#include "bind_compact.h"
#include "bind_group_classifier.h"
#include "bind_group_rows.h"
#include "bind_label_attention.h"
#include "bind_linear.h"
#include "bind_mlc.h"
#include "bind_pscl.h"
#include "bind_sscl.h"
#include "bind_sscl_mean.h"
#include "bind_zlpr.h"
#include "dispatch.h"
#include "parallel.h"

namespace sadcl {
namespace {

Array make_array(uintptr_t data, int dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (dtype < kF32 || dtype > kI64) throw py::value_error("Array: unknown dtype code " + std::to_string(dtype));
  if (shape.size() != strides.size())
    throw py::value_error("Array: expected as many strides as sizes, got " + std::to_string(shape.size()) +
                          " sizes and " + std::to_string(strides.size()) + " strides");
  return checked_array("Array", data, dtype, shape.data(), strides.data(), shape.size());
}

void bind_exp2(const Array& x, const Array& out) {
  check_rank("x", x, 1);
  check_buffer("x", x, x.dtype == kF64 ? kF64 : kF32, x.shape[0]);
  check_buffer("out", out, x.dtype, x.shape[0]);
  kernels().exp2_array(x, out);
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
  m.def("set_dtypes", [](const py::dict& codes) { dtype_codes() = codes; }, "torch's dtypes to codes of array.h");
  m.def("isa", [] { return std::string(kernels().isa); }, "Instruction set in use");
  m.def("supported_isas", &supported_isas, "Instruction sets this processor can run, best first");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on (for tests)");
  m.def("build_info", &build_info, "Compiler, OpenMP, instruction sets compiled in");
  m.def("exp2", &bind_exp2, "The contrastive kernels' 2^x (for tests)", py::arg("x"), py::arg("out"));
  m.def(
      "fma_peak", [](int threads) { return kernels().fma_peak(threads); }, py::call_guard<py::gil_scoped_release>(),
      py::arg("threads"), "Measured float32 FLOP/s of independent FMAs (for benchmarks)");
  bind_compact(m);
  bind_sscl(m);
  bind_sscl_mean(m);
  bind_pscl(m);
  bind_asl(m);
  bind_mlc(m);
  bind_zlpr(m);
  bind_label_attention(m);
  bind_linear(m);
  bind_group_classifier(m);
  bind_group_rows(m);
  bind_bank(m);
  bind_average_precision(m);
}
