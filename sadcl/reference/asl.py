"""Oracle of the asymmetric loss (ASL), in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def asl(
    logits: Tensor,
    labels: Tensor,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detach_focal_weight: bool,
) -> Tensor:
    r"""Loss of every element, before weights and reduction.

    With ``p = sigmoid(logit)`` and ``q = min(1 - p + clip, 1)``:

        l = -(y log max(p, eps) + (1 - y) log max(q, eps)) * w
        w = (1 - p y - q (1 - y)) ^ (gamma_pos y + gamma_neg (1 - y)),     0 ^ 0 = 1

    ``y`` may be soft, in [0, 1]; ``y = -1`` is ignored (loss 0, gradient 0). Where ``p`` or ``q`` is under ``eps`` the
    value is floored at ``log eps`` and that logarithm has gradient 0. ``detach_focal_weight`` makes ``w`` a constant.

    Source: Asymmetric Loss For Multi-Label Classification (ICCV 2021), eqs. 4 to 7, with soft labels.

    Args:
        logits: ``[B, C]`` floating.
        labels: ``[B, C]`` in [0, 1], or -1.
        gamma_neg, gamma_pos: focusing exponents >= 0.
        clip: probability margin in [0, 1).
        eps: floor of both probabilities, > 0.
        detach_focal_weight: treat ``w`` as a constant.

    Returns:
        ``[B, C]`` float64.
    """
    x, y = logits.double(), labels.double()
    valid = y != -1
    x, y = torch.where(valid, x, 0.0), torch.where(valid, y, 0.0)  # whatever an ignored place holds, NaN included
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    log_q = logsigmoid(-x) if clip == 0 else torch.log((not_p + clip).clamp(max=1.0))
    log_floor = math.log(eps)
    log_likelihood = y * logsigmoid(x).clamp(min=log_floor) + (1 - y) * log_q.clamp(min=log_floor)
    base = y * not_p + (1 - y) * (p - clip).clamp(min=0.0)
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    # A base of 0 has weight 0^gamma and no gradient; ones stand in so that pow's derivative stays finite.
    positive = base > 0
    power = torch.where(positive, base, 1.0) ** gamma
    weight = torch.where(positive, power, (gamma == 0).to(power.dtype))
    if detach_focal_weight:
        weight = weight.detach()
    return torch.where(valid, -log_likelihood * weight, 0.0)
