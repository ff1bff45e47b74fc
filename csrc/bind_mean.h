// What the bindings of the losses' means share: a sum of losses, and one number that stands for a whole array of them.
#pragma once
#include <vector>

#include "bind.h"

namespace sadcl {

// Room for losses of the accumulation type of `like`, which are added up.
class Losses {
 public:
  Losses(const Array& like, int64_t count)
      : wide_(like.dtype == kF64), count_(count), room_(size_t(wide_ ? count : count / 2 + 1)) {}
  void* data() { return room_.data(); }
  double total() const { return wide_ ? sum<double>() : sum<float>(); }

 private:
  template <class T>
  double sum() const {
    const T* x = reinterpret_cast<const T*>(room_.data());
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) sum += double(x[i]);
    return sum;
  }

  bool wide_;
  int64_t count_;
  std::vector<double> room_;
};

// The same number at every index of the first `dims` dimensions of `like`, in its accumulation type.
class Everywhere {
 public:
  Everywhere(double value, const Array& like, int first, int dims) : wide_(value), narrow_(float(value)) {
    array_.data = like.dtype == kF64 ? static_cast<void*>(&wide_) : static_cast<void*>(&narrow_);
    array_.dtype = accumulation(like);
    array_.dims = dims;
    for (int d = 0; d < dims; ++d) array_.shape[d] = like.shape[first + d], array_.stride[d] = 0;
  }
  Everywhere(const Everywhere&) = delete;
  const Array& array() const { return array_; }

 private:
  double wide_;
  float narrow_;
  Array array_;
};

// What a mean over `active` is divided by.
inline double at_least_one(int64_t active) { return active > 0 ? double(active) : 1; }

}  // namespace sadcl
