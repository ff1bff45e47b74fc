"""Oracle of the zero-bounded log-sum-exp loss (ZLPR), in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def zlpr(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Loss of every image, before weights and reduction.

        l_b = log(1 + sum_{c: y_bc = 0} exp(x_bc)) + log(1 + sum_{c: y_bc = 1} exp(-x_bc))

    Sentinels: a class that is ignored (-1) is in neither sum, whatever its logit holds, and has gradient 0; an image
    without classes in a sum has logarithm 0 there. NaN in a logit that is not ignored makes its image NaN.

    Source: ZLPR: A Novel Loss for Multi-label Classification (arXiv 2208.02955), eq. 5.

    Args:
        logits: ``[B, C]`` floating.
        labels: ``[B, C]`` with values in {-1, 0, 1}.

    Returns:
        ``[B]`` float64.
    """
    x = logits.double()
    zero = x.new_zeros(x.shape[0], 1)

    def over(terms: Tensor, there: Tensor) -> Tensor:
        return torch.logsumexp(torch.cat([zero, terms.masked_fill(~there, float("-inf"))], 1), 1)

    return over(x, labels == 0) + over(-x, labels == 1)
