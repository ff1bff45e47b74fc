// Plain form: keys and values of all positions are projected, then every (image, head) attends d wide.
#pragma once
#include "label_attention_parts.h"

SADCL_KERNELS_BEGIN

template <class T, class Product>
struct Plain {
  const Problem<T>& p;
  Product& mm;
  T *q, *keys, *values, *context, *weights, *mass;

  // Head h of image b of a matrix [B * rows, E], rows outside or summed over; `shared`: the same for all images.
  Source head(const T* x, int64_t rows, bool sum_over, bool shared = false) const {
    const Index down = {p.E}, along = {1};
    return source(x, sum_over ? along : down, sum_over ? down : along, shared ? 0 : rows * p.E, p.d);
  }
  Source of_queries(bool sum_over) const { return head(q, p.C, sum_over, p.Q == 1); }
  // Weights (or their gradient) of one (image, head): [L, C], or turned [C, L].
  Source of_weights(const T* w, bool turned) const {
    const Index down = {p.H * p.C}, along = {1};
    return source(w, turned ? along : down, turned ? down : along, p.L * p.H * p.C, p.C);
  }
  Result<T> to_weights(T* w) const { return result(w, {p.H * p.C}, p.L * p.H * p.C, p.C); }
  Result<T> to_head(T* x, int64_t rows) const { return result(x, {p.E}, rows * p.E, p.d); }
  Operand kept(Source s) const {  // padded positions of projected memory may be NaN
    Operand x = operand(s);
    x.drop = p.a.padded, x.drop_batch = p.L;
    return x;
  }

  void forward(const Vector<T>& bias) {
    const int64_t E = p.E;
    Result<T> k = result(keys, {E}), v = result(values, {E});
    k.bias = bias.from(E), v.bias = bias.from(2 * E);
    mm({p.B * p.L, E, E}, p.positions(true, false, true), operand(p.weight(1, true, false)), k);
    mm({p.B * p.L, E, E}, p.positions(false, false, true), operand(p.weight(2, true, false)), v);
    mm({p.L, p.C, p.d, {p.B, p.H}}, operand(head(keys, p.L, false)), operand(of_queries(false)), to_weights(weights));
    normalise(p, weights, p.a.survivors ? static_cast<T*>(p.a.soft) : nullptr, mass, mm.threads());
    mm({p.C, p.d, p.L, {p.B, p.H}}, operand(of_weights(weights, true)), kept(head(values, p.L, true)),
       to_head(context, p.C));
  }

  // From the context's gradient to that of the projected queries, and to everything on the way.
  void backward(const LabelAttentionBackward& g, const T* grad_context, T* grad_q, WeightGradients<T>& made) {
    const int64_t E = p.E, rows = p.B * p.L;
    const int threads = mm.threads();
    Scratch<T> grad_weights(rows * p.H * p.C), grad_keys(rows * E), grad_values(rows * E);
    T *ds = grad_weights.get(), *dk = grad_keys.get(), *dv = grad_values.get();
    const Sizes back = {p.L, p.d, p.C, {p.B, p.H}};
    mm({p.L, p.C, p.d, {p.B, p.H}}, operand(head(values, p.L, false)), operand(head(grad_context, p.C, false)),
       to_weights(ds));
    normalise_backward<T>(p, ds, nullptr, static_cast<const T*>(g.grad_weights), threads);
    mm(back, operand(of_weights(weights, false)), operand(head(grad_context, p.C, true)), to_head(dv, p.L));
    mm(back, operand(of_weights(ds, false)), operand(of_queries(true)), to_head(dk, p.L));
    if (grad_q != nullptr) queries_backward(ds, grad_q);
    if (g.grad_in_weight != nullptr) {
      T* db = static_cast<T*>(g.grad_in_bias) + E;
      made(g.grad_in_weight, p.a.in_weight.dtype, 1, [&](T* to) {
        mm({E, E, rows}, operand(source(dk, {1}, {E})), p.positions(true, true, true), result(to, {E}));
      });
      made(g.grad_in_weight, p.a.in_weight.dtype, 2, [&](T* to) {
        mm({E, E, rows}, operand(source(dv, {1}, {E})), p.positions(false, true, true), result(to, {E}));
      });
      column_sums<T>(dk, rows, E, nullptr, 1, db, threads);
      column_sums<T>(dv, rows, E, nullptr, 1, db + E, threads);
    }
    T *dm = static_cast<T*>(g.grad_memory), *dp = static_cast<T*>(g.grad_pos);
    if (dp != nullptr)
      mm({rows, E, E}, operand(source(dk, {E}, {1})), operand(p.weight(1, false, false)), result(dp, {E}));
    if (dm == nullptr) return;
    if (dp != nullptr) memcpy(dm, dp, rows * E * sizeof(T));
    else mm({rows, E, E}, operand(source(dk, {E}, {1})), operand(p.weight(1, false, false)), result(dm, {E}));
    Result<T> more = result(dm, {E});
    more.accumulate = true;
    mm({rows, E, E}, operand(source(dv, {E}, {1})), operand(p.weight(2, false, false)), more);
  }

  void queries_backward(const T* ds, T* grad_q) {
    if (p.Q == 1) {  // one set of queries: the sum over positions runs over all images
      const Source turned = source(ds, {1}, {p.H * p.C}, p.C);
      Operand k = operand(source(keys, {1}, {p.E}, p.d));
      k.drop = p.a.padded;
      mm({p.C, p.d, p.B * p.L, {p.H, 1}}, operand(turned), k, result(grad_q, {p.E}, p.d));
    } else {
      mm({p.C, p.d, p.L, {p.B, p.H}}, operand(of_weights(ds, true)), kept(head(keys, p.L, true)), to_head(grad_q, p.C));
    }
  }
};

SADCL_KERNELS_END
