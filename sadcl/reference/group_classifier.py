"""Oracle of the group-wise classifier, in float64."""

from __future__ import annotations

from torch import Tensor


def group_classifier(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``logit[b, c] = <weight[c], features[b, c]> + bias[c]``.

    Source: SADCL (ECAI 2023), the group-wise classifier behind the label transformer.

    Args:
        features: ``[B, C, E]``.
        weight: ``[C, E]``.
        bias: ``[C]``.

    Returns:
        ``[B, C]`` float64.
    """
    return (features.double() * weight.double()).sum(dim=-1) + bias.double()
