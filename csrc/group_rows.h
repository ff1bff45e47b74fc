// Arguments of own rows against columns of all ranks (or a part of them), forward and backward.
#pragma once
#include "mlc.h"

namespace sadcl {

// `in`: anchors are features [R, 1, D] with labels [R, C] (kIds: [R, 1]), columns are keys [K, D] with key_labels; no
// prototypes (whose weights are given: kDense). T is the accumulation type.
struct GroupRowsForward {
  MlcInputs in;
  MlcPeers peers;
  double* sums;  // [5, R]: peak, sum of e^(s - peak / temperature), of f s, of f, and how many f are not 0
};

struct GroupRowsBackward {
  MlcInputs in;
  MlcPeers peers;
  const void* anchors;  // T [4, R]: m sum_j W_ij, m times the factor of f, and lse as peak and log-sum
  const void* columns;  // T [4, K]: the same of the columns; null where they are no anchors
  void* gradient;       // T [R, D]: sum_j (G_ij + G_ji) z_j is added
  void* grad_columns;   // T [K, D]: sum_i G_ij z_i; may be null
};

}  // namespace sadcl
