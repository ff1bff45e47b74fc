"""Oracle of prototype-to-sample contrastive learning (PSCL): the equations, in float64."""

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
    valid, positive = target != -1, target == 1
    losses = 0.0 * torch.where(valid, score, 0.0).sum(dim=0)

    def masked(there: Tensor, classes: Tensor) -> Tensor:
        return score[:, classes].masked_fill(~there[:, classes], float("-inf"))

    (classes,) = positive.any(dim=0).nonzero(as_tuple=True)
    found = torch.logsumexp(masked(valid, classes), 0) - torch.logsumexp(masked(positive, classes), 0)
    losses = losses.index_put((classes,), found)
    if released:
        (classes,) = (valid.any(dim=0) & ~positive.any(dim=0)).nonzero(as_tuple=True)
        of_class = masked(valid, classes)
        peak = of_class.detach().amax(dim=0) if classes.numel() else losses[:0]
        losses = losses.index_put((classes,), torch.logsumexp(of_class, 0) - peak)
    return losses
