"""What the contrastive oracles share."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension; a zero vector stays zero and gets no gradient."""
    is_zero = (x == 0).all(dim=-1, keepdim=True)
    # Ones stand in for zero rows before the division, so that neither pass sees 0/0.
    safe = torch.where(is_zero, torch.ones_like(x), x)
    # A direction has no length: this one keeps squares from overflowing and vanishing.
    safe = safe / safe.detach().abs().amax(dim=-1, keepdim=True)
    return torch.where(is_zero, torch.zeros_like(x), safe / safe.norm(dim=-1, keepdim=True))
