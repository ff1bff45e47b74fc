"""Oracle of the single-label supervised contrastive loss (SupCon), in float64, with an N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def supcon(features: Tensor, positive_weight: Tensor, temperature: Tensor | float) -> Tensor:
    r"""Loss of every anchor, before weights and reduction.

    ``features`` are taken as they are (the caller normalises). With rows ``i = (b, v)``, ``s_ij = x_i . x_j /
    temperature``, ``A(i)`` all rows but ``i`` and ``w_ip >= 0`` the weight that the image of ``i`` gives to
    the image of ``p`` as a positive (0 or 1 in the paper, ``w_ii = 0``):

        l_i = log sum_{a in A(i)} exp(s_ia)  -  sum_p w_ip s_ip / sum_p w_ip,      0 where all w_ip are 0

    Source: Supervised Contrastive Learning (NeurIPS 2020), eq. 2 (L_out).

    Args:
        features: ``[B, V, D]`` floating.
        positive_weight: ``[B, B]``, row ``b`` for anchors of image ``b``; it may be asymmetric.
        temperature: number or 0-d tensor > 0.

    Returns:
        ``[B, V]`` float64.
    """
    b, v, d = features.shape
    x = features.double().reshape(b * v, d)
    s = x @ x.t() / temperature
    is_self = torch.eye(b * v, dtype=torch.bool, device=x.device)
    weight = positive_weight.double().repeat_interleave(v, 0).repeat_interleave(v, 1).masked_fill(is_self, 0.0)
    total = weight.sum(dim=1)
    has_positive = total > 0
    normaliser = torch.logsumexp(s.masked_fill(is_self, float("-inf")), dim=1)
    # Kernels make scores twice, and here the two cancel: a budget of roundings has to see both.
    mean_positive = (weight * (x @ x.t() / temperature)).sum(dim=1) / torch.where(has_positive, total, 1.0)
    return torch.where(has_positive, normaliser - mean_positive, 0.0).reshape(b, v)
