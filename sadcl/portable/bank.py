"""The memory bank's update in plain torch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def update(x: Any, out: Any) -> None:
    """Write ``x.slots``, see :class:`sadcl.ops.bank.Inputs`."""
    scores = wide(x.scores)
    recognised = (scores if x.probabilities else scores.sigmoid()) > x.threshold
    write = recognised & (x.labels == 1)
    current = x.slots[: x.features.shape[0]]
    if current.device.type == "cpu":  # elsewhere the host would wait to hear how many there are
        image, label = write.nonzero().unbind(1)
        current[image, label] = x.features[image, label].to(current.dtype)
    else:
        current.copy_(torch.where(write[:, :, None], x.features.to(current.dtype), current))


def wide(scores: Tensor) -> Tensor:
    """Half precision would round the threshold."""
    return scores if scores.dtype == torch.float64 else scores.float()
