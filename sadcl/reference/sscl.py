"""Oracle of sample-to-sample contrastive learning (SSCL): the equations, in float64, with an N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import unit


def sscl(features: Tensor, target: Tensor, temperature: Tensor | float, released: bool = False) -> Tensor:
    r"""Loss of every anchor, before weights and reduction.

    A row is one label embedding ``x[b, v, c]``; it is *active* when ``target[b, c] == 1``. With
    ``z = x / |x|``, ``s_ij = z_i . z_j / temperature``, ``A(i)`` the active rows other than ``i`` and ``P(i)`` those of
    ``A(i)`` with the class of ``i``:

        paper:     l_i = log sum_{a in A(i)} exp(s_ia)  -  mean_{p in P(i)} s_ip
        released:  r_i = max(0, max_{a in A(i)} s_ia)
                   l_i = log(1e-5 + sum_{a in A(i)} exp(s_ia - r_i))  -  mean_{p in P(i)} (s_ip - R_ip)

    ``R_ip`` is the maximum over all ``C`` classes of ``s * [both images have the class]`` between the (image, view) of
    ``i`` and that of ``p``: a class that is not active in both counts as 0. ``r`` and ``R`` are constants in the
    gradient. Sentinels: an inactive row and a row with an empty ``P(i)`` have loss 0; no active row at all gives zeros
    that are still connected to ``features``; a zero vector has ``z = 0`` and gradient 0; a NaN in an active row makes
    every loss that sees it NaN. ``target == -1`` (ignored) is inactive.

    Source: SADCL (ECAI 2023), eq. for L_SSCL; released form as in docs/faithfulness.md.

    Args:
        features: ``[B, V, C, D]`` floating.
        target: ``[B, C]`` with values in {-1, 0, 1}.
        temperature: number or 0-d tensor > 0.
        released: use the released code's value and normaliser.

    Returns:
        ``[B, V, C]`` float64.
    """
    b, v, c, d = features.shape
    x = features.double()
    class_of_pair, image_of_pair = (target == 1).t().nonzero(as_tuple=True)
    z = unit(x[image_of_pair, :, class_of_pair]).reshape(-1, d)
    row_class = class_of_pair.repeat_interleave(v)
    n = z.shape[0]
    s = z @ z.t() / temperature
    # Kernels make scores twice, and here the two cancel: a budget of roundings has to see both.
    again = z @ z.t() / temperature
    is_self = torch.eye(n, dtype=torch.bool, device=z.device)
    positive = (row_class[:, None] == row_class[None, :]) & ~is_self
    n_positive = positive.sum(dim=1)
    others = s.masked_fill(is_self, float("-inf"))
    if released:
        r = torch.cat([again.masked_fill(is_self, 0.0), others.new_zeros(n, 1)], dim=1).amax(dim=1).detach()
        normaliser = torch.log(1e-5 + torch.exp(others - r[:, None]).sum(dim=1))
        numerator = again - _pair_maximum(x, target, image_of_pair, temperature).detach()
    else:
        has_other = n > 1
        normaliser = torch.logsumexp(others, dim=1) if has_other else others.new_zeros(n)
        numerator = again
    mean_positive = torch.where(positive, numerator, 0.0).sum(dim=1) / n_positive.clamp(min=1)
    loss = torch.where(n_positive > 0, normaliser - mean_positive, 0.0)
    out = x.new_zeros(b, v, c).index_put(
        (image_of_pair[:, None], torch.arange(v, device=x.device)[None, :], class_of_pair[:, None]), loss.reshape(-1, v)
    )
    return out + x.flatten()[:0].sum()  # connected to the graph even without an active row


def _pair_maximum(x: Tensor, target: Tensor, image_of_pair: Tensor, temperature: Tensor | float) -> Tensor:
    """``R`` between the (image, view)s of all pairs of rows: ``[N, N]``."""
    b, v, c, d = x.shape
    active = (target == 1).repeat_interleave(v, dim=0)  # [B V, C]
    z = unit(x).reshape(b * v, c, d)
    z = torch.where(active[:, :, None], z, torch.zeros_like(z))
    both = active[:, None, :] & active[None, :, :]
    s = torch.einsum("icd,jcd->ijc", z, z) / temperature
    maximum = torch.where(both, s, 0.0).amax(dim=2)  # [B V, B V]
    views = torch.arange(v, device=x.device)
    image_view = (image_of_pair[:, None] * v + views[None, :]).reshape(-1)
    return maximum[image_view][:, image_view]
