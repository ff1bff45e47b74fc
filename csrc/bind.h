// What the binding files share: checks whose errors name the argument, and the functions that register the ops.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "array.h"

namespace sadcl {

namespace py = pybind11;

constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16", "uint8",
                                       "int8",    "int16",   "int32",    "int64"};

inline std::string shape_text(const Array& a) {
  std::string text = "[";
  for (int d = 0; d < a.dims; ++d) text += (d ? ", " : "") + std::to_string(a.shape[d]);
  return text + "]";
}

inline int64_t count(const Array& a) {
  int64_t n = 1;
  for (int d = 0; d < a.dims; ++d) n *= a.shape[d];
  return n;
}

inline bool contiguous(const Array& a) {
  if (count(a) == 0) return true;
  int64_t expected = 1;
  for (int d = a.dims - 1; d >= 0; --d) {
    if (a.shape[d] != 1 && a.stride[d] != expected) return false;
    expected *= a.shape[d];
  }
  return true;
}

inline void check_rank(const char* name, const Array& a, int dims) {
  if (a.dims != dims)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(dims) + " dimensions, got shape " +
                          shape_text(a));
}

inline void check_dtype(const char* name, const Array& a, DType expected) {
  if (a.dtype != expected)
    throw py::type_error(std::string(name) + ": expected " + kDTypeNames[expected] + ", got " + kDTypeNames[a.dtype]);
}

// A contiguous array of the given type and number of elements.
inline void check_buffer(const char* name, const Array& a, DType dtype, int64_t elements) {
  check_dtype(name, a, dtype);
  if (count(a) != elements || !contiguous(a))
    throw py::value_error(std::string(name) + ": expected " + std::to_string(elements) +
                          " contiguous elements, got shape " + shape_text(a));
}

// Shape, as a list of sizes.
inline void check_shape(const char* name, const Array& a, std::initializer_list<int64_t> shape) {
  Array expected;
  for (int64_t size : shape) expected.shape[expected.dims++] = size;
  bool same = a.dims == expected.dims;
  for (int d = 0; same && d < a.dims; ++d) same = a.shape[d] == expected.shape[d];
  if (!same)
    throw py::value_error(std::string(name) + ": expected shape " + shape_text(expected) + ", got " + shape_text(a));
}

inline void check_floating(const char* name, const Array& a) {
  if (a.dtype > kF16)
    throw py::type_error(std::string(name) + ": expected a floating dtype, got " + kDTypeNames[a.dtype]);
}

inline void check_temperature(double temperature) {
  if (!(temperature > 0 && temperature < __builtin_huge_val()))
    throw py::value_error("temperature: expected a finite number > 0, got " + std::to_string(temperature));
}

// A floating array of a shape, float64 if and only if the memory is.
inline void check_input(const char* name, const Array& x, std::initializer_list<int64_t> shape, bool wide) {
  check_floating(name, x);
  check_shape(name, x, shape);
  if ((x.dtype == kF64) != wide)
    throw py::type_error(std::string(name) + ": float64 only where memory is, got " + kDTypeNames[x.dtype]);
}

inline DType accumulation(const Array& features) { return features.dtype == kF64 ? kF64 : kF32; }

}  // namespace sadcl
