// What Python passes to a binding: the fields of an op's tuples, by name (sadcl/ops/_native.py).
#pragma once
#include "bind.h"

namespace sadcl {

class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  // A tensor that has to be there.
  const Array& tensor(const char* name) const {
    const Array* x = optional(name);
    if (x == nullptr) throw py::type_error(std::string(name) + ": expected a tensor, got None");
    return *x;
  }

  // A tensor, or null where Python says None.
  const Array* optional(const char* name) const {
    const py::object value = get(name);
    return value.is_none() ? nullptr : value.cast<const Array*>();
  }

  // The address of a contiguous tensor of a type and size.
  template <class T = void>
  T* buffer(const char* name, DType dtype, int64_t elements) const {
    const Array& x = tensor(name);
    check_buffer(name, x, dtype, elements);
    return static_cast<T*>(x.data);
  }

  // The same, or null where Python says None.
  template <class T = void>
  T* optional_buffer(const char* name, DType dtype, int64_t elements) const {
    return optional(name) == nullptr ? nullptr : buffer<T>(name, dtype, elements);
  }

  // The value of a tensor of one float32 or float64.
  double scalar(const char* name) const {
    const Array& x = tensor(name);
    check_shape(name, x, {});
    return x.dtype == kF64 ? *buffer<const double>(name, kF64, 1) : *buffer<const float>(name, kF32, 1);
  }

  double temperature(const char* name = "temperature") const {
    const double value = scalar(name);
    if (!(value > 0 && value < __builtin_huge_val()))
      throw py::value_error(std::string(name) + ": expected a finite number > 0, got " + std::to_string(value));
    return value;
  }

  // Store a number in a tensor of one float32 or float64, if there is one.
  void store(const char* name, double value) const {
    if (optional(name) == nullptr) return;
    if (tensor(name).dtype == kF64) *buffer<double>(name, kF64, 1) = value;
    else *buffer<float>(name, kF32, 1) = static_cast<float>(value);
  }

  bool has(const char* name) const { return PyDict_GetItemString(given_.ptr(), name) != nullptr; }
  bool flag(const char* name) const { return get(name).cast<bool>(); }
  double number(const char* name) const { return get(name).cast<double>(); }
  int64_t integer(const char* name) const { return get(name).cast<int64_t>(); }
  int threads() const { return get("threads").cast<int>(); }

 private:
  py::object get(const char* name) const {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);
    if (value == nullptr) throw py::type_error(std::string(name) + ": missing");
    return py::reinterpret_borrow<py::object>(value);
  }

  const py::kwargs& given_;
};

}  // namespace sadcl
