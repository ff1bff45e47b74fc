// Bindings of label attention (label_attention.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "bind.h"
#include "dispatch.h"

namespace sadcl {
namespace {

// What forward and backward share, by name: tensors as Array or None.
struct Given {
  const py::dict& tensors;

  const Array* get(const char* name) const {
    const py::object value = tensors[name];
    return value.is_none() ? nullptr : value.cast<const Array*>();
  }
  Array optional(const char* name) const {
    const Array* x = get(name);
    return x == nullptr ? Array() : *x;
  }
  // A contiguous tensor of a given type and size; null where it may be absent and is.
  void* buffer(const char* name, DType dtype, int64_t elements, bool required = true) const {
    const Array* x = get(name);
    if (x == nullptr) {
      if (required) throw py::type_error(std::string(name) + ": expected a tensor, got None");
      return nullptr;
    }
    check_buffer(name, *x, dtype, elements);
    return x->data;
  }
};

LabelAttention make(const Given& given, int64_t heads, bool folded, double keep_scale, int threads) {
  LabelAttention a;
  a.query = given.optional("query"), a.memory = given.optional("memory"), a.memory_pos = given.optional("memory_pos");
  a.in_weight = given.optional("in_weight"), a.in_bias = given.optional("in_bias");
  a.out_weight = given.optional("out_weight"), a.out_bias = given.optional("out_bias");
  a.heads = heads, a.folded = folded, a.keep_scale = keep_scale, a.threads = threads;
  check_rank("memory", a.memory, 3);
  const bool wide = a.memory.dtype == kF64;
  const int64_t B = a.memory.shape[0], L = a.memory.shape[1], E = a.memory.shape[2];
  if (a.query.dims != 2) check_rank("query", a.query, 3);
  const int64_t C = a.query.shape[a.query.dims - 2], Q = a.query.dims == 2 ? 1 : B;
  if (heads < 1 || E % heads != 0) throw py::value_error("heads: expected a divisor of " + std::to_string(E));
  if (B < 1 || C < 1 || L < 1) throw py::value_error("memory, query: expected no empty dimension");
  check_input("memory", a.memory, {B, L, E}, wide);
  if (a.query.dims == 2) check_input("query", a.query, {C, E}, wide);
  else check_input("query", a.query, {B, C, E}, wide);
  check_input("in_weight", a.in_weight, {3 * E, E}, wide);
  check_input("out_weight", a.out_weight, {E, E}, wide);
  if (a.in_bias.data) check_input("in_bias", a.in_bias, {3 * E}, wide);
  if (a.out_bias.data) check_input("out_bias", a.out_bias, {E}, wide);
  if (a.memory_pos.data) check_input("memory_pos", a.memory_pos, {B, L, E}, wide);
  const DType acc = accumulation(a.memory);
  const int64_t all = B * L * heads * C, keys = folded ? Q * heads * C * E : B * L * E;
  a.padded = static_cast<const uint8_t*>(given.buffer("padded", kU8, B * L, false));
  a.kept = static_cast<const uint8_t*>(given.buffer("kept", kU8, all, false));
  a.weights = given.buffer("weights", acc, all);
  a.soft = given.buffer("soft", acc, a.kept ? all : 0);
  a.mass = given.buffer("mass", acc, heads * B * C);
  a.q = given.buffer("q", acc, Q * C * E);
  a.keys = given.buffer("keys", acc, keys);
  a.values = given.buffer("values", acc, folded ? B * heads * C * E : B * L * E);
  a.context = given.buffer("context", acc, B * C * E);
  a.out = nullptr;
  return a;
}

void bind_label_attention_forward(const py::dict& tensors, int64_t heads, bool folded, double keep_scale, int threads) {
  const Given given = {tensors};
  LabelAttention a = make(given, heads, folded, keep_scale, threads);
  a.out = given.buffer("out", accumulation(a.memory), count(a.memory) / a.memory.shape[1] * a.query.shape[a.query.dims - 2]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.label_attention_forward(a);
}

void bind_label_attention_backward(const py::dict& tensors, int64_t heads, bool folded, double keep_scale, int threads) {
  const Given given = {tensors};
  LabelAttentionBackward g;
  g.forward = make(given, heads, folded, keep_scale, threads);
  const LabelAttention& a = g.forward;
  const DType acc = accumulation(a.memory);
  const int64_t E = a.memory.shape[2], all = count(a.memory);
  g.grad_out = given.optional("grad_out");
  check_input("grad_out", g.grad_out, {a.memory.shape[0], a.query.shape[a.query.dims - 2], E}, acc == kF64);
  g.grad_weights = given.buffer("grad_weights", acc, all / E * heads * a.query.shape[a.query.dims - 2], false);
  g.grad_query = given.buffer("grad_query", acc, count(a.query), false);
  g.grad_memory = given.buffer("grad_memory", acc, all, false);
  g.grad_pos = given.buffer("grad_pos", acc, all, false);
  g.grad_in_weight = given.buffer("grad_in_weight", acc, 3 * E * E, false);
  g.grad_in_bias = given.buffer("grad_in_bias", acc, 3 * E, g.grad_in_weight != nullptr);
  g.grad_out_weight = given.buffer("grad_out_weight", acc, E * E, false);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.label_attention_backward(g);
}

}  // namespace

void bind_label_attention(py::module_& m) {
  m.def("label_attention_forward", &bind_label_attention_forward, py::arg("tensors"), py::arg("heads"), py::arg("folded"),
        py::arg("keep_scale"), py::arg("threads"), "tensors: the names in label_attention.h to Array or None");
  m.def("label_attention_backward", &bind_label_attention_backward, py::arg("tensors"), py::arg("heads"), py::arg("folded"),
        py::arg("keep_scale"), py::arg("threads"));
}

}  // namespace sadcl
