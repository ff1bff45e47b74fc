// Group-wise linear classifier: logit[b, c] = <W[c], h[b, c]> + bias[c], compiled once per instruction set.
#include "group_classifier.h"

#include "class_floats.h"

SADCL_KERNELS_BEGIN
namespace {

int classifier_threads(const Array& features, int requested) {
  return features.shape[0] * features.shape[1] * features.shape[2] < 1 << 14 ? 1 : team_size(requested);
}

template <class T>
void forward(const GroupClassifierForward& a) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1], pairs = (B + 1) / 2;
  const T* bias = static_cast<const T*>(a.bias);
  T* logits = static_cast<T*>(a.logits);
#pragma omp parallel for num_threads(classifier_threads(a.features, a.threads)) schedule(static)
  for (int64_t i = 0; i < pairs * C; ++i) {
    const int64_t c = i % C, b = i / C * 2;
    double dot[2], square[2];
    b + 1 < B ? products<2, false, T>(a.features, a.weight, b, c, dot, square)
              : products<1, false, T>(a.features, a.weight, b, c, dot, square);
    for (int64_t r = 0; r < 2 && b + r < B; ++r) logits[(b + r) * C + c] = T(dot[r] + double(bias[c]));
  }
}

template <class T>
void backward(const GroupClassifierBackward& a) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  Scratch<double> along(B * C);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c)
      along[b * C + c] =
          static_cast<const T*>(a.grad_logits.data)[b * a.grad_logits.stride[0] + c * a.grad_logits.stride[1]];
  row_gradients<T>({&a.features, &a.weight, along.get(), nullptr, nullptr, nullptr, false, a.grad_features,
                    a.grad_weight, classifier_threads(a.features, a.threads)});
}

}  // namespace

void group_classifier_forward(const GroupClassifierForward& args) {
  SADCL_BY_DTYPE(group_classifier_forward, forward, args.features.dtype, args);
}

void group_classifier_backward(const GroupClassifierBackward& args) {
  SADCL_BY_DTYPE(group_classifier_backward, backward, args.features.dtype, args);
}

SADCL_KERNELS_END
