// Label attention with its projections, compiled once per instruction set. Read in this order: matmul.h
// (products), label_attention_parts.h (operands, softmax), label_attention_folded.h, label_attention_plain.h.
#include "label_attention_folded.h"
#include "label_attention_plain.h"

SADCL_KERNELS_BEGIN
namespace {

template <template <class, class> class Form, class T, class Product>
Form<T, Product> form(const Problem<T>& p, Product& mm) {
  auto at = [](void* data) { return static_cast<T*>(data); };
  return {p, mm, at(p.a.q), at(p.a.keys), at(p.a.values), at(p.a.context), at(p.a.weights), at(p.a.mass)};
}

// Whether products round what they are given to bfloat16, as torch's do. Their sums, the softmax and what is kept
// between the passes stay float32.
[[maybe_unused]] bool in_pairs(const LabelAttention& a) {
  return a.rounded && a.memory.dtype == kBF16 && a.query.dtype == kBF16 && a.in_weight.dtype == kBF16 &&
         a.out_weight.dtype == kBF16;
}

template <class T, class Product>
void forward_by(const LabelAttention& a) {
  const Problem<T> p(a);
  Product mm(a.threads);
  const Vector<T> bias(a.in_bias, 3 * p.E), out_bias(a.out_bias, p.E);
  Result<T> q = result(static_cast<T*>(a.q), {p.E}), out = result(static_cast<T*>(a.out), {p.E});
  q.bias = bias.from(0), out.bias = out_bias.from(0);
  mm({p.Q * p.C, p.E, p.E}, operand(source(a.query, p.query_rows(), p.query_columns())),
     operand(p.weight(0, true, false)), q);
  if (a.folded) form<Folded>(p, mm).forward(bias);
  else form<Plain>(p, mm).forward(bias);
  mm({p.B * p.C, p.E, p.E}, operand(source(static_cast<T*>(a.context), {p.E}, {1})), operand(p.out_weight(true)), out);
}

template <class T, class Product>
void backward_by(const LabelAttentionBackward& g) {
  const LabelAttention& a = g.forward;
  const Problem<T> p(a);
  Product mm(a.threads);
  const int64_t E = p.E, labels = p.B * p.C;
  const Vector<T> bias(a.in_bias, 3 * E);
  const Index out_rows = Problem<T>::rows_of(g.grad_out), out_columns = {g.grad_out.stride[2]};
  auto narrower = [](const void* wanted, const Array& weight) { return wanted && weight.dtype != own_dtype<T>(); };
  WeightGradients<T> made(E * E, narrower(g.grad_out_weight, a.out_weight) || narrower(g.grad_in_weight, a.in_weight),
                          mm.threads());
  if (g.grad_out_weight != nullptr)
    made(g.grad_out_weight, a.out_weight.dtype, 0, [&](T* to) {
      mm({E, E, labels}, operand(source(g.grad_out, out_columns, out_rows)),
         operand(source(static_cast<T*>(a.context), {1}, {E})), result(to, {E}));
    });
  if (!g.grad_query && !g.grad_memory && !g.grad_pos && !g.grad_in_weight) return;
  Scratch<T> grad_context(labels * E), grad_q(p.Q * p.C * E);
  mm({labels, E, E}, operand(source(g.grad_out, out_rows, out_columns)), operand(p.out_weight(false)),
     result(grad_context.get(), {E}));
  T* dq = g.grad_query || g.grad_in_weight ? grad_q.get() : nullptr;
  if (a.folded) form<Folded>(p, mm).backward(g, grad_context.get(), dq, bias, made);
  else form<Plain>(p, mm).backward(g, grad_context.get(), dq, made);
  if (g.grad_query != nullptr)
    mm({p.Q * p.C, E, E}, operand(source(dq, {E}, {1})), operand(p.weight(0, false, false)),
       result(static_cast<T*>(g.grad_query), {E}));
  if (g.grad_in_weight == nullptr) return;
  made(g.grad_in_weight, a.in_weight.dtype, 0, [&](T* to) {
    mm({E, E, p.Q * p.C}, operand(source(dq, {1}, {E})), operand(source(a.query, p.query_columns(), p.query_rows())),
       result(to, {E}));
  });
  column_sums<T>(dq, p.Q * p.C, E, nullptr, 1, static_cast<T*>(g.grad_in_bias), mm.threads());
}

template <class T>
void forward(const LabelAttention& a) {
  if constexpr (kHasPairs && sizeof(T) == 4)
    if (in_pairs(a)) return forward_by<T, Matmul<T, Pair>>(a);
  forward_by<T, Matmul<T>>(a);
}

template <class T>
void backward(const LabelAttentionBackward& g) {
  if constexpr (kHasPairs && sizeof(T) == 4)
    if (in_pairs(g.forward)) return backward_by<T, Matmul<T, Pair>>(g);
  backward_by<T, Matmul<T>>(g);
}

}  // namespace

void label_attention_forward(const LabelAttention& args) {
  SADCL_BY_DTYPE(label_attention_forward, forward, args.memory.dtype, args);
}

void label_attention_backward(const LabelAttentionBackward& args) {
  SADCL_BY_DTYPE(label_attention_backward, backward, args.forward.memory.dtype, args);
}

SADCL_KERNELS_END
