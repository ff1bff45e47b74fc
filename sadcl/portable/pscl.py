"""PSCL in plain torch operators, over chunks of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype

# Images at a time, so that float64 copies of them stay in a CPU's cache (2 MB); elsewhere launches cost more.
_CHUNK = {"cpu": 1 << 18}


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.pscl.Inputs`."""
    features, temperature = x.features, x.temperature
    b, c, _ = features.shape
    _checks.check_positive("temperature", temperature)
    positive, valid = x.target == 1, x.target != -1
    wide = norm_dtype(features.device)
    norm_p = torch.linalg.vector_norm(x.prototypes.to(wide), dim=-1)
    unit = x.prototypes.to(wide) / _safe(norm_p)[:, None]
    score, norm_x = features.new_empty((b, c), dtype=wide), features.new_empty((b, c), dtype=wide)
    for part in _chunks(features):
        z = features[part].to(wide)
        norm_x[part] = torch.where(valid[part], torch.linalg.vector_norm(z, dim=-1), 0.0)
        score[part] = torch.linalg.vecdot(z, unit) / _safe(norm_x[part])
    score /= temperature
    lse = torch.stack([_logsumexp(score, valid), _logsumexp(score, positive)])
    has_positive = positive.any(dim=0)
    class_loss = torch.where(has_positive, lse[0] - lse[1], 0.0)
    if x.released and b > 0:
        highest = score.masked_fill(~valid, float("-inf")).amax(dim=0)
        class_loss = torch.where(~has_positive & valid.any(dim=0), lse[0] - highest, class_loss)
    class_loss = class_loss.to(accumulation_dtype(features.dtype))
    return {"class_loss": class_loss, "score": score, "norm_x": norm_x, "norm_p": norm_p, "lse": lse}


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of features, prototypes and temperature."""
    features, prototypes, temperature = x.features, x.prototypes, x.temperature
    score, norm_x, norm_p, lse = saved.score, saved.norm_x, saved.norm_p, saved.lse
    positive, valid = x.target == 1, x.target != -1
    has_positive = positive.any(dim=0)
    # dL/ds = G (softmax over the valid images - softmax over the positive ones)
    grad_score = torch.where(valid, torch.exp(score - lse[0]), 0.0)
    grad_score = grad_score - torch.where(positive, torch.exp(score - lse[1]), 0.0)
    if not x.released:
        grad_score = torch.where(has_positive, grad_score, 0.0)
    grad_score = grad_score * upstream.grad_class_loss
    grad_temperature = -(grad_score * torch.where(valid, score, 0.0)).sum() / temperature
    wide = norm_p.dtype
    unit = prototypes.to(wide) / _safe(norm_p)[:, None]
    grad_cosine = torch.where(valid, grad_score / temperature, 0.0)
    cosine = torch.where(valid, score * temperature, 0.0)
    # With u = p / |p|, z = x / |x|, k = dL/dcos: dL/dx = k (u - cos z) / |x|, 0 for zero vectors, and
    # dL/du = sum k (z - cos u): two factors a row, and one number a class.
    along = torch.where(norm_x > 0, grad_cosine / _safe(norm_x), 0.0)
    across = -along * cosine / _safe(norm_x)
    grad_unit = -(grad_cosine * cosine).sum(dim=0)[:, None] * unit
    grad_features = features.new_empty(features.shape)
    everything = features.device.type == "cpu" and bool(valid.all())  # elsewhere the host would wait
    for part in _chunks(features):
        z = features[part].to(along.dtype)
        if not everything:
            z = torch.where(valid[part][..., None], z, 0.0)
        grad_unit += torch.einsum("bc,bcd->cd", along[part], z)
        grad_features[part] = torch.addcmul(along[part][..., None] * unit, across[part][..., None], z)
    grad_prototypes = torch.where(norm_p[:, None] == 0, 0.0, grad_unit / _safe(norm_p)[:, None])
    return {
        "grad_features": grad_features,
        "grad_prototypes": grad_prototypes.to(prototypes.dtype),
        "grad_temperature": grad_temperature.to(temperature.dtype),
    }


def _chunks(features: Tensor) -> Iterator[slice]:
    b, c, d = features.shape
    step = max(1, _CHUNK.get(features.device.type, 1 << 24) // max(c * d, 1))
    return (slice(start, start + step) for start in range(0, b, step))


def _safe(norm: Tensor) -> Tensor:
    """To divide by: a zero vector stays one."""
    return torch.where(norm == 0, 1.0, norm)


def _logsumexp(score: Tensor, chosen: Tensor) -> Tensor:
    """Over the chosen images of each class; ``-inf`` where there is none."""
    return torch.logsumexp(score.masked_fill(~chosen, float("-inf")), dim=0)
