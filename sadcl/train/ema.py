"""An exponential moving average of the weights: timm's ModelEmaV3 with the run's settings."""

from __future__ import annotations

import torch
from torch import nn

from sadcl._own import own_tensors
from sadcl.train.config import EmaConfig

__all__ = ["make_ema"]


def make_ema(model: nn.Module, config: EmaConfig) -> nn.Module | None:
    """The average of ``model``'s weights, or None if the config has none.

    ``ema.update(model, step)`` after optimizer step t = 1, 2, ...: ``average <- d average + (1 - d) weights`` with
    ``d = decay``, with warm-up ``d = min(decay, 1 - t^(-2/3))``, and d = 0 at t = 1. ``ema.module`` is the averaged
    model. Buffers (batch-norm statistics, memory bank) are copied, not averaged.
    """
    if config.decay == 0:
        return None
    from timm.utils import ModelEmaV3

    class Average(ModelEmaV3):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def update(self, model: nn.Module, step: int | None = None) -> None:
            super().update(model, step)
            for mine, its in zip(own_tensors(self.module), own_tensors(model), strict=True):
                mine.copy_(its)

    return Average(model, decay=config.decay, use_warmup=config.warmup, exclude_buffers=True)
