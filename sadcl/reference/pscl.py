"""Oracle of prototype-to-sample contrastive learning (PSCL): the equations, in float64, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import unit


def pscl(
    features: Tensor, prototypes: Tensor, target: Tensor, temperature: Tensor | float, released: bool = False
) -> Tensor:
    r"""Loss of every class, before weights and reduction.

    With ``s_bc = cos(x_bc, p_c) / temperature`` and the images ``b`` whose ``target[b, c]`` is not ignored (-1):

        l_c = logsumexp_b s_bc - logsumexp_{b: target = 1} s_bc       if class c has a positive image
        l_c = 0                                                       paper, no positive
        l_c = logsumexp_b s_bc - max_b s_bc                           released, no positive; the maximum is a constant

    Sentinels: a class whose images are all ignored gives 0; a zero vector has cosine 0 and gradient 0; NaN in any row
    that is not ignored makes its class NaN.

    Source: SADCL (ECAI 2023), eq. for L_PSCL; released form as in docs/faithfulness.md.

    Args:
        features: ``[B, C, D]`` floating.
        prototypes: ``[C, D]`` floating.
        target: ``[B, C]`` with values in {-1, 0, 1}.
        temperature: number or 0-d tensor > 0.
        released: add the released code's term for classes without a positive.

    Returns:
        ``[C]`` float64.
    """
    x, p = features.double(), prototypes.double()
    x = torch.where((target == -1)[:, :, None], 0.0, x)  # whatever an ignored place holds, NaN included
    score = (unit(x) * unit(p)).sum(dim=-1) / temperature
    losses = []
    for c in range(score.shape[1]):
        valid = score[target[:, c] != -1, c]
        positive = score[target[:, c] == 1, c]
        if positive.numel() > 0:
            losses.append(torch.logsumexp(valid, 0) - torch.logsumexp(positive, 0))
        elif released and valid.numel() > 0:
            losses.append(torch.logsumexp(valid, 0) - valid.amax().detach())
        else:
            losses.append(valid[:0].sum() if valid.isfinite().all() else valid.sum() * 0.0)
    return torch.stack(losses)
