// What Python passes to a binding: the fields of an op's tuples, by name (sadcl/ops/_native.py).
//
// Tensors are read through what any torch tensor offers Python (data_ptr, dtype, shape, stride): no torch headers.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "bind.h"

namespace sadcl {

// An array that memory can have, of an address and sizes from outside.
inline Array checked_array(const std::string& name, uintptr_t data, int dtype, const int64_t* shape,
                           const int64_t* strides, size_t dims) {
  if (dims > size_t(kMaxDims))
    throw py::value_error(name + ": expected at most " + std::to_string(kMaxDims) + " dimensions, got " +
                          std::to_string(dims));
  Array a;
  a.data = reinterpret_cast<void*>(data);
  a.dtype = DType(dtype);
  a.dims = int(dims);
  double elements = 1, reach = 0;  // without empty dimensions: products of sizes must not overflow there either
  bool negative = false;
  for (int d = 0; d < a.dims; ++d) {
    a.shape[d] = shape[d];
    a.stride[d] = strides[d];
    negative |= shape[d] < 0;
    if (shape[d] > 1) elements *= double(shape[d]), reach += double(shape[d] - 1) * std::fabs(double(strides[d]));
  }
  if (negative) throw py::value_error(name + ": expected no negative size, got shape " + shape_text(a));
  constexpr double kAddressable = double(int64_t(1) << 59);
  if (!(elements < kAddressable && reach < kAddressable))
    throw py::value_error(name + ": expected sizes and strides that memory can have, got shape " + shape_text(a));
  if (data == 0 && count(a) > 0)
    throw py::value_error(name + ": expected an address, got null for shape " + shape_text(a));
  return a;
}

// torch's dtypes and their codes; Python fills it (_native.extension).
inline py::dict& dtype_codes() {
  static py::dict* codes = new py::dict();  // never destroyed: the interpreter may be gone by then
  return *codes;
}

inline Array array_of(const char* name, py::handle value) {
  static const py::handle kArray = py::type::of<Array>();
  if (py::type::handle_of(value).is(kArray)) return value.cast<const Array&>();
  static PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const kDtype = PyUnicode_InternFromString("dtype");
  static PyObject* const kShape = PyUnicode_InternFromString("shape");
  static PyObject* const kStride = PyUnicode_InternFromString("stride");
  const auto checked = [](PyObject* made) {
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  };
  const py::object dtype = checked(PyObject_GetAttr(value.ptr(), kDtype));
  PyObject* code = PyDict_GetItemWithError(dtype_codes().ptr(), dtype.ptr());
  if (code == nullptr) throw py::type_error(std::string(name) + ": no kernel reads " + std::string(py::str(dtype)));
  const py::object address = checked(PyObject_CallMethodNoArgs(value.ptr(), kDataPtr));
  const py::object shape = checked(PyObject_GetAttr(value.ptr(), kShape));
  const py::object stride = checked(PyObject_CallMethodNoArgs(value.ptr(), kStride));
  const size_t dims = size_t(PyTuple_GET_SIZE(shape.ptr()));
  int64_t sizes[kMaxDims] = {}, strides[kMaxDims] = {};
  for (size_t d = 0; d < dims && d < size_t(kMaxDims); ++d) {
    sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
    strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), d));
  }
  return checked_array(name, PyLong_AsSize_t(address.ptr()), int(PyLong_AsLong(code)), sizes, strides, dims);
}

class Fields {
 public:
  // NamedTuples, whose fields are the arguments, and what comes beside them.
  Fields(const py::args& parts, const py::kwargs& others) {
    static PyObject* const kFields = PyUnicode_InternFromString("_fields");
    given_.reserve(48);
    for (const auto& item : others) given_.push_back({PyUnicode_AsUTF8(item.first.ptr()), item.second});
    for (py::handle part : parts) {
      const py::object names =
          py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject*)Py_TYPE(part.ptr()), kFields));
      if (!names || !PyTuple_Check(part.ptr())) throw py::type_error("expected NamedTuples of arguments");
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names.ptr()); ++i)
        given_.push_back({PyUnicode_AsUTF8(PyTuple_GET_ITEM(names.ptr(), i)), PyTuple_GET_ITEM(part.ptr(), i)});
    }
  }

  // Is it there, and not None?
  bool has(const char* name) const {
    const py::handle value = find(name);
    return value && !value.is_none();
  }

  // A tensor that has to be there.
  Array tensor(const char* name) const {
    const py::handle value = get(name);
    if (value.is_none()) throw py::type_error(std::string(name) + ": expected a tensor, got None");
    return array_of(name, value);
  }

  // A tensor, or an array without data where Python says None.
  Array optional(const char* name) const {
    const py::handle value = get(name);
    return value.is_none() ? Array() : array_of(name, value);
  }

  // The address of a contiguous tensor of a type and size.
  template <class T = void>
  T* buffer(const char* name, DType dtype, int64_t elements) const {
    const Array x = tensor(name);
    check_buffer(name, x, dtype, elements);
    return static_cast<T*>(x.data);
  }

  // The same, or null where Python says None.
  template <class T = void>
  T* optional_buffer(const char* name, DType dtype, int64_t elements) const {
    return get(name).is_none() ? nullptr : buffer<T>(name, dtype, elements);
  }

  // The value of a tensor of one float32 or float64.
  double scalar(const char* name) const {
    const Array x = tensor(name);
    check_shape(name, x, {});
    if (x.dtype == kF64) return *static_cast<const double*>(x.data);
    check_dtype(name, x, kF32);
    return *static_cast<const float*>(x.data);
  }

  double temperature(const char* name = "temperature") const {
    const double value = scalar(name);
    if (!(value > 0 && value < __builtin_huge_val()))
      throw py::value_error(std::string(name) + ": expected a finite number > 0, got " + std::to_string(value));
    return value;
  }

  // Store a number in a tensor of one float32 or float64, if there is one.
  void store(const char* name, double value) const {
    if (!has(name)) return;
    const Array x = tensor(name);
    check_shape(name, x, {});
    if (x.dtype == kF64) {
      *static_cast<double*>(x.data) = value;
      return;
    }
    check_dtype(name, x, kF32);
    *static_cast<float*>(x.data) = static_cast<float>(value);
  }

  bool flag(const char* name) const { return get(name).cast<bool>(); }
  double number(const char* name) const { return get(name).cast<double>(); }
  int64_t integer(const char* name) const { return get(name).cast<int64_t>(); }
  int threads() const { return get("threads").cast<int>(); }

 private:
  struct Entry {
    const char* name;
    py::handle value;
  };

  py::handle find(const char* name) const {
    for (const Entry& entry : given_)
      if (std::strcmp(entry.name, name) == 0) return entry.value;
    return {};
  }

  py::handle get(const char* name) const {
    const py::handle value = find(name);
    if (!value) throw py::type_error(std::string(name) + ": missing");
    return value;
  }

  std::vector<Entry> given_;
};

}  // namespace sadcl
