// The matrix products of linear layers, forward and backward, on matmul.h.
#include "linear.h"

#include "matmul.h"

SADCL_KERNELS_BEGIN
namespace {

template <class T>
void run(const Linear& a) {
  const int64_t M = a.left.shape[0], K = a.left.shape[1], N = a.right.shape[1];
  Operand left, right;
  left.values.array = a.left, right.values.array = a.right;
  left.values.outer = {a.left.stride[0]}, left.values.k = {a.left.stride[1]};
  right.values.outer = {a.right.stride[1]}, right.values.k = {a.right.stride[0]};
  Scratch<T> bias(N);
  Result<T> out;
  out.data = static_cast<T*>(a.out), out.rows = {N};
  if (a.bias.data != nullptr) {
    read_row(a.bias, 0, a.bias.stride[0], N, bias.get());
    out.bias = bias.get();
  }
  Matmul<T> product(a.threads);
  product({M, N, K}, left, right, out);
}

}  // namespace

void linear(const Linear& args) { SADCL_BY_DTYPE(linear, run, args.left.dtype, args); }

SADCL_KERNELS_END
