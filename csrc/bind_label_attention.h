// Bindings of label attention (label_attention.cpp).
// Part of module.cpp, the one translation unit that parses pybind11: every further one costs 5 to 9 s of build time.
#pragma once
#include "dispatch.h"
#include "fields.h"

namespace sadcl {
namespace {

LabelAttention make_label_attention(const Fields& given) {
  LabelAttention a;
  a.query = given.tensor("query"), a.memory = given.tensor("memory"), a.memory_pos = given.optional("memory_pos");
  a.in_weight = given.tensor("in_weight"), a.in_bias = given.optional("in_bias");
  a.out_weight = given.tensor("out_weight"), a.out_bias = given.optional("out_bias");
  a.heads = given.integer("heads"), a.folded = given.flag("folded"), a.rounded = given.flag("rounded");
  a.keep_scale = given.number("keep_scale"), a.threads = given.threads();
  check_rank("memory", a.memory, 3);
  const bool wide = a.memory.dtype == kF64;
  const int64_t B = a.memory.shape[0], L = a.memory.shape[1], E = a.memory.shape[2];
  if (a.query.dims != 2) check_rank("query", a.query, 3);
  const int64_t C = a.query.shape[a.query.dims - 2], Q = a.query.dims == 2 ? 1 : B;
  if (a.heads < 1 || E % a.heads != 0) throw py::value_error("heads: expected a divisor of " + std::to_string(E));
  if (C < 1 || L < 1 || E < 1) throw py::value_error("memory, query: expected at least one position and one query");
  check_input("memory", a.memory, {B, L, E}, wide);
  if (a.query.dims == 2) check_input("query", a.query, {C, E}, wide);
  else check_input("query", a.query, {B, C, E}, wide);
  check_input("in_weight", a.in_weight, {3 * E, E}, wide);
  check_input("out_weight", a.out_weight, {E, E}, wide);
  if (a.in_bias.data) check_input("in_bias", a.in_bias, {3 * E}, wide);
  if (a.out_bias.data) check_input("out_bias", a.out_bias, {E}, wide);
  if (a.memory_pos.data) check_input("memory_pos", a.memory_pos, {B, L, E}, wide);
  const DType acc = accumulation(a.memory);
  const int64_t all = B * L * a.heads * C, keys = a.folded ? Q * a.heads * C * E : B * L * E;
  a.padded = given.optional_buffer<const uint8_t>("padded", kU8, B * L);
  a.survivors = given.optional_buffer<const uint8_t>("survivors", kU8, all);
  a.weights = given.buffer("weights", acc, all);
  a.soft = given.buffer("soft", acc, a.survivors ? all : 0);
  a.mass = given.buffer("mass", acc, a.heads * B * C);
  a.q = given.buffer("q", acc, Q * C * E);
  a.keys = given.buffer("keys", acc, keys);
  a.values = given.buffer("values", acc, a.folded ? B * a.heads * C * E : B * L * E);
  a.context = given.buffer("context", acc, B * C * E);
  a.out = nullptr;
  return a;
}

void bind_label_attention_forward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  LabelAttention a = make_label_attention(given);
  a.out = given.buffer("out", accumulation(a.memory),
                       a.memory.shape[0] * a.memory.shape[2] * a.query.shape[a.query.dims - 2]);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.label_attention_forward(a);
}

void bind_label_attention_backward(const py::args& parts, const py::kwargs& others) {
  const Fields given(parts, others);
  LabelAttentionBackward g;
  g.forward = make_label_attention(given);
  const LabelAttention& a = g.forward;
  const DType acc = accumulation(a.memory);
  const int64_t E = a.memory.shape[2], all = count(a.memory);
  g.grad_out = given.tensor("grad_out");
  check_input("grad_out", g.grad_out, {a.memory.shape[0], a.query.shape[a.query.dims - 2], E}, acc == kF64);
  g.grad_weights = given.optional_buffer("grad_weights", acc, all / E * a.heads * a.query.shape[a.query.dims - 2]);
  g.grad_query = given.optional_buffer("grad_query", acc, count(a.query));
  g.grad_memory = given.optional_buffer("grad_memory", acc, all);
  g.grad_pos = given.optional_buffer("grad_memory_pos", acc, all);
  g.grad_in_weight = given.optional_buffer("grad_in_weight", a.in_weight.dtype, 3 * E * E);
  g.grad_in_bias = given.optional_buffer("grad_in_bias", acc, 3 * E);
  g.grad_out_weight = given.optional_buffer("grad_out_weight", a.out_weight.dtype, E * E);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.label_attention_backward(g);
}

}  // namespace

void bind_label_attention(py::module_& m) {
  m.def("label_attention_forward", &bind_label_attention_forward,
        "The fields of sadcl.ops.label_attention.Inputs and Outputs");
  m.def("label_attention_backward", &bind_label_attention_backward,
        "The same fields, grad_out, grad_weights or None, and grad_ of each input to fill, or None");
}

}  // namespace sadcl
