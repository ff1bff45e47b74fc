"""What our losses are compared with: the formulas as a good torch user writes them, float32, autograd backward.

Three levels, from the published code's cost to the best that torch gives; a kernel that only beats the first has beaten
nothing. tests/ops/test_peers.py holds each of them against the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def sscl_dense(features: Tensor, labels: Tensor, temperature: float = 0.2) -> Tensor:
    """The masked formula over all ``B V C`` rows: what a direct implementation does (N x N with N = B V C)."""
    b, v, c, d = features.shape
    z = normalize(features.reshape(-1, d), dim=1)
    active = (labels == 1)[:, None].expand(b, v, c).reshape(-1)
    label = torch.arange(c, device=labels.device).repeat(b * v)
    s = z @ z.t() / temperature
    others = active[:, None] & active[None, :]
    others.fill_diagonal_(False)
    positive = others & (label[:, None] == label[None, :])
    log_probability = s - torch.logsumexp(s.masked_fill(~others, float("-inf")), dim=1, keepdim=True)
    count = positive.sum(dim=1)
    # -inf and NaN of rows without others must not reach the sum, nor its gradient.
    mean = torch.where(positive, log_probability, 0.0).sum(dim=1) / count.clamp(min=1)
    return -mean.sum() / active.sum().clamp(min=1)


def _compacted_rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows ``[N, D]`` and their classes ``[N]``."""
    v = features.shape[1]
    image, label = (labels == 1).nonzero(as_tuple=True)
    return features[image, :, label].flatten(0, 1), label.repeat_interleave(v)


def _contrast(x: Tensor, label: Tensor, temperature: float) -> Tensor:
    z = normalize(x, dim=1)
    s = z @ z.t() / temperature
    itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    positive = (label[:, None] == label[None, :]) & ~itself
    log_probability = s - torch.logsumexp(s.masked_fill(itself, float("-inf")), dim=1, keepdim=True)
    count = positive.sum(dim=1)
    mean = torch.where(positive, log_probability, 0.0).sum(dim=1) / count.clamp(min=1)
    return -mean.sum() / max(x.shape[0], 1)


def _contrast_by_class_sums(x: Tensor, label: Tensor, classes: int, temperature: float) -> Tensor:
    z = normalize(x, dim=1)
    s = z @ z.t() / temperature
    lse = torch.logsumexp(s.masked_fill(torch.eye(x.shape[0], dtype=torch.bool, device=x.device), float("-inf")), dim=1)
    total = z.new_zeros(classes, z.shape[1]).index_add(0, label, z)
    count = torch.bincount(label, minlength=classes)[label] - 1
    mean = (z * (total[label] - z)).sum(dim=1) / temperature / count.clamp(min=1)
    return torch.where(count > 0, lse - mean, 0.0).sum() / max(x.shape[0], 1)


def sscl_compacted(features: Tensor, labels: Tensor, temperature: float = 0.2) -> Tensor:
    """Active rows only, then the masked formula: the obvious good implementation."""
    return _contrast(*_compacted_rows(features, labels), temperature)


def sscl_class_sums(features: Tensor, labels: Tensor, temperature: float = 0.2) -> Tensor:
    """Active rows only, numerator by class sums: no N x N mask."""
    return _contrast_by_class_sums(*_compacted_rows(features, labels), labels.shape[1], temperature)


_compiled = torch.compile(_contrast, dynamic=True)


def sscl_compiled(features: Tensor, labels: Tensor, temperature: float = 0.2) -> Tensor:
    """:func:`sscl_compacted` with everything behind the gather through ``torch.compile`` (dynamic row count)."""
    return _compiled(*_compacted_rows(features, labels), temperature)


SSCL = {
    "dense N x N": sscl_dense,
    "compacted": sscl_compacted,
    "compacted, class sums": sscl_class_sums,
    "compacted, torch.compile": sscl_compiled,
}
