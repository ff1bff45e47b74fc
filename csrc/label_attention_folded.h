// Folded form: with fewer labels than positions the projections move to the label side.
//
//   q_h . (W_k,h (m + pos) + b_k,h) = (W_k,h^T q_h) . (m + pos) + const       the softmax drops the constant
//   sum_l w_l (W_v,h m_l + b_v,h)   = W_v,h (sum_l w_l m_l) + b_v,h sum_l w_l
//
// Positions are added to the memory where the products pack it: B L E additions, in the shadow of reading it, against
// heads C L E multiplications for scores of their own; and there is one way for shared and for per-image positions.
#pragma once
#include "label_attention_parts.h"

SADCL_KERNELS_BEGIN

template <class T, class Product>
struct Folded {
  const Problem<T>& p;
  Product& mm;
  T *q, *keys, *values, *context, *weights, *mass;

  int64_t width() const { return p.H * p.C; }
  // [n, heads, C, E] as a matrix of all (n, c), one head a batch.
  Index head_rows() const { return {p.E, p.C, width() * p.E}; }
  Source by_head(const T* x, bool sum_over) const {
    return source(x, sum_over ? Index{1} : head_rows(), sum_over ? head_rows() : Index{1}, p.C * p.E);
  }
  // [heads * C, E] of an image; the folded queries may be the same for all.
  Source by_image(const T* x, bool sum_over, bool shared = false) const {
    return source(x, {sum_over ? 1 : p.E}, {sum_over ? p.E : 1}, shared ? 0 : width() * p.E);
  }
  Source of_weights(const T* w, bool turned) const {
    return source(w, {turned ? 1 : width()}, {turned ? width() : 1}, p.L * width());
  }
  // d columns of a matrix [rows, E]: one head a batch.
  Source slice(const T* x, bool sum_over) const { return source(x, {sum_over ? 1 : p.E}, {sum_over ? p.E : 1}, p.d); }
  // Sizes of a product over positions: all images in one if the queries are shared, else one a batch.
  Sizes over_positions(int64_t m, int64_t n, int64_t k) const { return {m, n, k, {p.Q, 1}}; }
  int64_t rows() const { return p.Q == 1 ? p.B * p.L : p.L; }

  void forward(const Vector<T>& bias) {
    const bool shared = p.Q == 1;
    const int64_t E = p.E;
    mm({p.Q * p.C, E, p.d, {p.H, 1}}, operand(slice(q, false)), operand(p.weight(1, false, true)),
       result(keys, head_rows(), p.C * E));
    mm(over_positions(rows(), width(), E), p.positions(true, false, shared), operand(by_image(keys, false, shared)),
       result(weights, {width()}, p.L * width()));
    normalise(p, weights, p.a.survivors ? static_cast<T*>(p.a.soft) : nullptr, mass, mm.threads());
    mm({width(), E, p.L, {p.B, 1}}, operand(of_weights(weights, true)), p.positions(false, true, false),
       result(values, {E}, width() * E));
    Result<T> c = result(context, {E}, p.d);
    c.bias = bias.from(2 * E), c.bias_batch = p.d, c.bias_factor = mass, c.factor_batch = p.B * p.C;
    mm({p.B * p.C, p.d, E, {p.H, 1}}, operand(by_head(values, false)), operand(p.weight(2, true, true)), c);
  }

  void backward(const LabelAttentionBackward& g, const T* grad_context, T* grad_q, const Vector<T>& bias,
                WeightGradients<T>& made) {
    const bool shared = p.Q == 1;
    const int64_t E = p.E, labels = p.B * p.C;
    const int threads = mm.threads();
    Scratch<T> grad_weights(p.B * p.L * width()), grad_values(labels * p.H * E), grad_mass(labels * p.H);
    T *ds = grad_weights.get(), *dv = grad_values.get();
    mm({labels, E, p.d, {p.H, 1}}, operand(slice(grad_context, false)), operand(p.weight(2, false, true)),
       result(dv, head_rows(), p.C * E));
    mm({p.L, width(), E, {p.B, 1}}, p.positions(false, false, false), operand(by_image(dv, false)),
       result(ds, {width()}, p.L * width()));
    if (bias.there) mass_backward(grad_context, bias.from(2 * E), grad_mass.get());
    normalise_backward<T>(p, ds, bias.there ? grad_mass.get() : nullptr, static_cast<const T*>(g.grad_weights),
                          threads);
    memory_backward(g, ds, dv);
    if (g.grad_in_weight != nullptr) {
      made(g.grad_in_weight, p.a.in_weight.dtype, 2, [&](T* to) {
        mm({p.d, E, labels, {p.H, 1}}, operand(slice(grad_context, true)), operand(by_head(values, true)),
           result(to, {E}, p.d * E));
      });
      column_sums<T>(grad_context, labels, E, mass, p.d, static_cast<T*>(g.grad_in_bias) + 2 * E, threads);
    }
    if (grad_q == nullptr) return;
    Scratch<T> grad_keys(p.Q * width() * E);
    T* df = grad_keys.get();
    mm(over_positions(width(), E, rows()), operand(of_weights(ds, true)), p.positions(true, true, shared),
       result(df, {E}, width() * E));
    mm({p.Q * p.C, p.d, E, {p.H, 1}}, operand(by_head(df, false)), operand(p.weight(1, true, true)),
       result(grad_q, {E}, p.d));
    if (g.grad_in_weight == nullptr) return;
    made(g.grad_in_weight, p.a.in_weight.dtype, 1, [&](T* to) {
      mm({p.d, E, p.Q * p.C, {p.H, 1}}, operand(slice(q, true)), operand(by_head(df, true)),
         result(to, {E}, p.d * E));
    });
    memset(static_cast<T*>(g.grad_in_bias) + E, 0, E * sizeof(T));  // the softmax does not see the key bias
  }

  void memory_backward(const LabelAttentionBackward& g, const T* ds, const T* dv) {
    T *dm = static_cast<T*>(g.grad_memory), *dp = static_cast<T*>(g.grad_pos), *by_keys = dp ? dp : dm;
    const int64_t E = p.E;
    if (by_keys == nullptr) return;
    mm(over_positions(rows(), E, width()), operand(of_weights(ds, false)), operand(by_image(keys, true, p.Q == 1)),
       result(by_keys, {E}, p.L * E));
    if (dm == nullptr) return;
    if (dp != nullptr) memcpy(dm, dp, p.B * p.L * E * sizeof(T));
    Result<T> more = result(dm, {E}, p.L * E);
    more.accumulate = true;
    mm({p.L, E, width(), {p.B, 1}}, operand(of_weights(weights, false)), operand(by_image(dv, true)), more);
  }

  // What the value bias says about the sums of the weights, [heads, B, C]; only under dropout do they move.
  void mass_backward(const T* grad_context, const T* bias, T* grad) const {
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t i = 0; i < p.B * p.C; ++i) {
        T sum = 0;
        for (int64_t j = h * p.d; j < (h + 1) * p.d; ++j) sum += grad_context[i * p.E + j] * bias[j];
        grad[h * p.B * p.C + i] = sum;
      }
  }
};

SADCL_KERNELS_END
