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
        losses = []
        for row, label in zip(x, y, strict=True):
            positive, negative = row[label == 1], row[label == 0]
            if positive.numel() == 0 or negative.numel() == 0:
                losses.append(0.0 * positive.sum())
                continue
            low = negative_temperature * torch.logsumexp(negative / negative_temperature, 0)
            high = positive_temperature * torch.logsumexp(-positive / positive_temperature, 0)
            losses.append(softplus(low + high, threshold=700.0))
        return torch.stack(losses)

    x = logits.double()
    return one_way(x, labels), one_way(x.t(), labels.t())
