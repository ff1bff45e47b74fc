// Arithmetic of SSCL that the kernels of a CPU and of a GPU share, and of its released variant.
#pragma once

SADCL_KERNELS_BEGIN

// Log of a row's sum of e^(s_ij - pivot), `sum` against its highest score; `moved` is e^(highest - pivot).
template <class T>
SADCL_INLINE T sscl_log_sum(T sum, T moved, bool released) {
  return log(released ? T(1e-5) + sum * moved : sum);
}

// A row's loss, of the mean over its positives p of s_ip and of R_ip.
template <class T>
SADCL_INLINE T sscl_row_loss(T pivot, T log_sum, T mean_positive, T mean_maximum, bool released) {
  return released ? log_sum - (mean_positive - mean_maximum) : (pivot + log_sum) - mean_positive;
}

// Gradient of x from that of z = x / |x|, `radial` = z.g, without the factor 1 / |x|.
template <class T>
SADCL_INLINE T sscl_tangential(T g, T z, T radial) {
  return g - z * radial;
}

SADCL_KERNELS_END
