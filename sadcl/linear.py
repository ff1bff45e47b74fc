"""The linear layer of the model: torch's parameters, the faster product."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional.linear import linear


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` on :func:`sadcl.functional.linear.linear`: same parameters, same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        return linear(input, self.weight, self.bias)
