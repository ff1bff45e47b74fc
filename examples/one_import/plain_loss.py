"""The sample-to-sample contrastive loss as one writes it in plain PyTorch: right, and with several N x N matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SampleContrastiveLoss(nn.Module):
    """Features ``[B, V, C, D]`` and labels ``[B, C]`` to the loss over all B V C rows."""

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        batch, views, classes, width = features.shape
        rows = F.normalize(features.reshape(-1, width), dim=1)
        active = labels[:, None].expand(-1, views, -1).reshape(-1) > 0
        label = torch.arange(classes).repeat(batch * views)
        others = ~torch.eye(len(rows), dtype=torch.bool) & active & active[:, None]
        positives = others & (label == label[:, None])
        scores = rows @ rows.T / self.temperature
        log_sum = scores.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
        terms = (log_sum - scores).masked_fill(~positives, 0.0).sum(1) / positives.sum(1).clamp(min=1)
        return terms.sum() / active.sum().clamp(min=1)
