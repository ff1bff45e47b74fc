"""Oracle of the two-way multi-label loss, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def two_way(
    logits: Tensor, labels: Tensor, positive_temperature: float, negative_temperature: float
) -> tuple[Tensor, Tensor]:
    r"""Loss of every image and of every class, before weights and reduction.

    Of a row (an image's logits) with a positive, and alike of a column (a class's logits), with
    ``lse_neg`` and ``lse_pos`` over its negatives and its positives:

        l = softplus( Tn lse_neg(x / Tn) + Tp lse_pos(-x / Tp) )

    Sentinels: without a positive l is 0; without a negative ``lse_neg`` is -inf and l is 0. An ignored label (-1) is
    in no sum, whatever its logit holds, and has gradient 0. NaN in a logit that is not ignored makes its row and its
    column NaN if they have a positive.

    Source: Two-way Multi-Label Loss (CVPR 2023), eqs. 7 and 8, with exact masks.

    Args:
        logits: ``[B, C]`` floating.
        labels: ``[B, C]`` with values in {-1, 0, 1}.
        positive_temperature, negative_temperature: ``Tp``, ``Tn`` > 0.

    Returns:
        ``[B]`` and ``[C]``, float64.
    """

    def one_way(x: Tensor, y: Tensor) -> Tensor:
        positive, negative = y == 1, y == 0
        nothing = 0.0 * torch.where(positive, x, 0.0).sum(dim=1)
        (rows,) = (positive.any(dim=1) & negative.any(dim=1)).nonzero(as_tuple=True)

        def over(terms: Tensor, there: Tensor, temperature: float) -> Tensor:
            masked = (terms[rows] / temperature).masked_fill(~there[rows], float("-inf"))
            return temperature * torch.logsumexp(masked, 1)

        low, high = over(x, negative, negative_temperature), over(-x, positive, positive_temperature)
        return nothing.index_put((rows,), softplus(low + high, threshold=700.0))

    x = logits.double()
    return one_way(x, labels), one_way(x.t(), labels.t())
