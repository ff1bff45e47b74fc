// Prototype-to-sample contrastive loss, compiled once per instruction set.
//
// Forward: one sweep over the features, class by class, for dot products and norms, then log-sum-exps of [B, C] scores.
// Backward: class by class, so that a prototype's gradient is one thread's sum and needs no atomics. Scores and all
// that hangs on them are float64: a gradient row hangs on one difference of two softmax weights.
#include "pscl.h"

#include "class_floats.h"
#include "pscl_formula.h"

SADCL_KERNELS_BEGIN
namespace {

constexpr double kInfinity = __builtin_huge_val();

int pscl_threads(const Array& features, int requested) {
  const int64_t size = features.shape[0] * features.shape[1] * features.shape[2];
  return size < 1 << 14 ? 1 : team_size(requested);
}

// e^x of n numbers in place; the array has room for whole vectors.
void exp_all(double* x, int64_t n) {
  for (int64_t i = n; i % kWide != 0; ++i) x[i] = 0;
  for (int64_t i = 0; i < n; i += kWide) storeu(x + i, exp<double>(loadu(x + i)));
}

// log sum e^x over n numbers, which it overwrites; -inf for none.
double log_sum_exp(double* x, int64_t n) {
  if (n == 0) return -kInfinity;
  double highest = -kInfinity, total = 0;
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  for (int64_t i = 0; i < n; ++i) x[i] -= highest;
  exp_all(x, n);
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return highest + __builtin_log(total);
}

// Dot products and squares of R (1 or 2) images' rows with the prototype of class c, whose numbers are `p` where they
// and the rows' (of type S) may be multiplied in float32.
template <int R, class S>
void products_as(const PsclForward& a, const float* p, [[maybe_unused]] float* gathered, int64_t b, int64_t c,
                 double* dot, double* square) {
  const Array& x = a.features;
  const S* row[R];
  for (int r = 0; r < R; ++r) {
    const int64_t offset = (b + r) * x.stride[0] + c * x.stride[1];
    row[r] = static_cast<const S*>(x.data) + offset;
    if constexpr (sizeof(S) == 4)
      if (gathered != nullptr) {
        read_row(x, offset, x.stride[2], x.shape[2], gathered + r * x.shape[2]);
        row[r] = gathered + r * x.shape[2];
      }
  }
  dot_floats<R>(row, p, x.shape[2], dot, square);
  for (int r = 0; r < R; ++r)
    if (!in_range(square[r])) products<1, true, float>(x, a.prototypes, b + r, c, dot + r, square + r);
}

template <int R, class T>
void products_of(const PsclForward& a, [[maybe_unused]] const T* p, [[maybe_unused]] T* gathered, int64_t b, int64_t c,
                 double* dot, double* square) {
  if constexpr (sizeof(T) == 4) {
    if (p != nullptr) switch (gathered != nullptr ? kF32 : a.features.dtype) {
        case kBF16: return products_as<R, BFloat16>(a, p, nullptr, b, c, dot, square);
        case kF16: return products_as<R, Float16>(a, p, nullptr, b, c, dot, square);
        default: return products_as<R, float>(a, p, gathered, b, c, dot, square);
      }
  }
  products<R, true, T>(a.features, a.prototypes, b, c, dot, square);
}

// Dot products into `score` and norms, of class c and images [first, last); ignored rows are not read. `room`
// is for three rows: a prototype, and two whose numbers do not lie side by side.
template <class T>
void dots_and_norms(const PsclForward& a, int64_t c, int64_t first, int64_t last, T* room) {
  const int64_t C = a.features.shape[1], D = a.features.shape[2];
  Array alone = a.prototypes;  // [1, C, D]: the norm of a prototype is its product with itself
  alone.dims = 3;
  for (int d = 2; d > 0; --d) alone.shape[d] = alone.shape[d - 1], alone.stride[d] = alone.stride[d - 1];
  double own, square_p;
  products<1, true, T>(alone, a.prototypes, 0, c, &own, &square_p);
  if (first == 0) a.norm_p[c] = __builtin_sqrt(square_p);
  const bool floats = sizeof(T) == 4 && in_range(square_p);
  const T* p = floats ? block_of<T>(a.prototypes, c * a.prototypes.stride[0], D, room) : nullptr;
  T* gathered = a.features.stride[2] != 1 && D > 1 ? room + D : nullptr;
  for (int64_t b = first; b < last; b += 2) {
    const int64_t i = b * C + c;
    double dot[2] = {}, square[2] = {};
    const bool one = a.target[i] != -1, two = b + 1 < last && a.target[i + C] != -1;
    if (one && two) {
      products_of<2, T>(a, p, gathered, b, c, dot, square);
    } else if (one) {
      products_of<1, T>(a, p, gathered, b, c, dot, square);
    } else if (two) {
      products_of<1, T>(a, p, gathered, b + 1, c, dot + 1, square + 1);
    }
    for (int64_t r = 0; r < 2 && b + r < last; ++r) {
      a.score[i + r * C] = dot[r];
      a.norm_x[i + r * C] = __builtin_sqrt(square[r]);
    }
  }
}

// From dot products to scores, log-sum-exps and the loss of class c. `x` has room for B numbers and a vector.
template <class T>
void class_loss(const PsclForward& a, int64_t c, double* x) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  double highest = -kInfinity;
  int64_t valid = 0, positive = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i = b * C + c;
    if (a.target[i] == -1) continue;
    a.score[i] = pscl_score(a.score[i], a.norm_x[i], a.norm_p[c], a.temperature);
    highest = a.score[i] > highest ? a.score[i] : highest;
    x[valid++] = a.score[i];
  }
  const double all = log_sum_exp(x, valid);
  for (int64_t b = 0; b < B; ++b)
    if (a.target[b * C + c] == 1) x[positive++] = a.score[b * C + c];
  const double some = log_sum_exp(x, positive);
  a.lse[c] = all;
  a.lse[C + c] = some;
  static_cast<T*>(a.class_loss)[c] = T(pscl_class_loss(all, some, highest, positive > 0, valid > 0, a.released));
}

template <class T>
void forward(const PsclForward& a) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1], D = a.features.shape[2], room = B + kWide;
  const int threads = pscl_threads(a.features, a.threads);
  const int64_t images = C < 2 * threads ? 4 : 32, blocks = B > images ? (B + images - 1) / images : 1;
  Scratch<double> rows(threads * room);
  Scratch<T> vectors(threads * 3 * D + 1);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < C * blocks; ++i) {
      const int64_t first = i % blocks * images, last = first + images < B ? first + images : B;
      dots_and_norms<T>(a, i / blocks, first, last, vectors.get() + thread_index() * 3 * D);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < C; ++c) class_loss<T>(a, c, rows.get() + thread_index() * room);
  }
}

// The factors of class c's gradients, see RowGradients; returns sum_b d loss / d score * score. `x` as in class_loss.
template <class T>
double factors(const PsclBackward& a, int64_t c, double* x, double* along, double* across, double* own) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1];
  const double upstream = static_cast<const T*>(a.grad_class_loss.data)[c * a.grad_class_loss.stride[0]];
  const bool active = a.released || a.lse[C + c] != -kInfinity;
  double turning = 0, cosines = 0;
  // d loss / d score = upstream (softmax over the valid images - softmax over the positive ones)
  double* y = x + B + kWide;
  for (int64_t b = 0; b < B; ++b) {
    const int8_t target = a.target[b * C + c];
    x[b] = active && target != -1 ? a.score[b * C + c] - a.lse[c] : -kInfinity;
    y[b] = active && target == 1 ? a.score[b * C + c] - a.lse[C + c] : -kInfinity;
  }
  exp_all(x, B);
  exp_all(y, B);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i = b * C + c;
    along[i] = across[i] = 0;
    if (a.target[i] == -1) continue;
    const double grad_score = (x[b] - y[b]) * upstream;
    const PsclFactors f =
        pscl_factors(grad_score, a.score[i], a.norm_x[i], a.norm_p[c], a.temperature, a.features.shape[2]);
    turning += f.turning, cosines += f.cosines;
    along[i] = f.along, across[i] = f.across;
  }
  own[c] = pscl_own(cosines, a.norm_p[c]);
  return turning;
}

template <class T>
double backward(const PsclBackward& a) {
  const int64_t B = a.features.shape[0], C = a.features.shape[1], room = 2 * (B + kWide);
  const int threads = pscl_threads(a.features, a.threads);
  Scratch<double> rows(threads * room), along(B * C), across(B * C), own(C), turning(C);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    for (int64_t c = C * t / threads; c < C * (t + 1) / threads; ++c)
      turning[c] = factors<T>(a, c, rows.get() + t * room, along.get(), across.get(), own.get());
  row_gradients<T>({&a.features, &a.prototypes, along.get(), across.get(), own.get(), a.norm_p, true, a.grad_features,
                    a.grad_prototypes, threads});
  double total = 0;
  for (int64_t c = 0; c < C; ++c) total += turning[c];
  return -total / a.temperature;
}

}  // namespace

void pscl_forward(const PsclForward& args) { SADCL_BY_DTYPE(pscl_forward, forward, args.features.dtype, args); }

double pscl_backward(const PsclBackward& args) {
  return SADCL_BY_DTYPE(pscl_backward, backward, args.features.dtype, args);
}

SADCL_KERNELS_END
