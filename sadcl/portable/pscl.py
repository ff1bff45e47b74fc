"""PSCL in plain torch operators, over chunks of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype

# Images at a time, so that a float64 copy of them stays in a CPU's cache (1 MB); elsewhere launches cost more.
_CHUNK = {"cpu": 1 << 17}


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.pscl.Inputs`."""
    features, temperature = x.features, x.temperature
    b, c, _ = features.shape
    _checks.check_positive("temperature", temperature)
    positive, ignored = x.target == 1, _ignored(x.target)
    wide = norm_dtype(features.device)
    norm_p, unit = _unit(x.prototypes, wide)
    score, norm_x = features.new_empty((b, c), dtype=wide), features.new_empty((b, c), dtype=wide)
    for part, z, spare in _chunks(features, wide):
        torch.linalg.vector_norm(z, dim=-1, out=norm_x[part])
        torch.sum(torch.mul(z, unit, out=spare), dim=-1, out=score[part])
    if ignored is not None:
        norm_x.masked_fill_(ignored, 0.0)
    score /= _safe(norm_x).mul_(temperature)
    lse = score.new_empty(2, c)
    torch.logsumexp(score.masked_fill(~positive, float("-inf")), 0, out=lse[1])
    there = score if ignored is None else score.masked_fill(ignored, float("-inf"))
    torch.logsumexp(there, 0, out=lse[0])
    has_positive = positive.any(dim=0)
    class_loss = torch.where(has_positive, lse[0] - lse[1], 0.0)
    if x.released and b > 0:
        absent = ~has_positive if ignored is None else ~has_positive & ~ignored.all(dim=0)
        class_loss = torch.where(absent, lse[0] - there.amax(dim=0), class_loss)
    class_loss = class_loss.to(accumulation_dtype(features.dtype))
    return {"class_loss": class_loss, "score": score, "norm_x": norm_x, "norm_p": norm_p, "lse": lse}


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of features, prototypes and temperature."""
    features, prototypes, temperature = x.features, x.prototypes, x.temperature
    score, norm_x, norm_p, lse = saved.score, saved.norm_x, saved.norm_p, saved.lse
    positive, ignored = x.target == 1, _ignored(x.target)
    # dL/ds = G (softmax over the valid images - softmax over the positive ones)
    grad_score = torch.exp(score - lse[0]).sub_(torch.exp(score - lse[1]).masked_fill_(~positive, 0.0))
    if not x.released:
        grad_score.masked_fill_(~positive.any(dim=0), 0.0)
    grad_score *= upstream.grad_class_loss
    if ignored is not None:
        score, grad_score = score.masked_fill(ignored, 0.0), grad_score.masked_fill_(ignored, 0.0)
    wide = norm_p.dtype
    # With u = p / |p|, z = x / |x|, k = dL/dcos: dL/dx = k (u - cos z) / |x|, 0 for zero vectors, and
    # dL/du = sum k (z - cos u): two factors a row, and one number a class.
    pulled = grad_score * score  # k cos
    of_class = pulled.sum(dim=0)
    safe = _safe(norm_x)
    along = grad_score.div_(temperature).div_(safe).masked_fill_(norm_x == 0, 0.0)
    across = pulled.neg_().div_(safe).div_(safe)
    unit = prototypes.to(wide) / _safe(norm_p)[:, None]
    grad_unit = unit * -of_class[:, None]
    grad_features = features.new_empty(features.shape)
    for part, z, spare in _chunks(features, wide):
        if ignored is not None:
            z = z.masked_fill(ignored[part][..., None], 0.0)
        if features.device.type != "cpu":
            grad_unit += torch.einsum("bc,bcd->cd", along[part], z)
        elif z.shape[0] == 1:
            grad_unit.addcmul_(z[0], along[part.start][:, None])
        else:
            grad_unit += (z * along[part][..., None]).sum(dim=0)  # a CPU's einsum copies each class
        torch.mul(z, across[part][..., None], out=spare).addcmul_(along[part][..., None], unit)
        grad_features[part] = spare
    grad_prototypes = grad_unit.div_(_safe(norm_p)[:, None]).masked_fill_(norm_p[:, None] == 0, 0.0)
    return {
        "grad_features": grad_features,
        "grad_prototypes": grad_prototypes.to(prototypes.dtype),
        "grad_temperature": (of_class.sum() / -temperature).to(temperature.dtype),
    }


def _ignored(target: Tensor) -> Tensor | None:
    """Which pairs take no part; None where a CPU sees that all do."""
    ignored = target == -1
    return ignored if target.device.type != "cpu" or bool(ignored.any()) else None


def _unit(rows: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norms ``[C]`` and unit vectors ``[C, D]``."""
    rows = rows.to(wide)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    return norm, rows / _safe(norm)[:, None]


def _chunks(features: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some images at a time ``[b, C, D]`` in the wide dtype, and as much room, which may be the same."""
    b, c, d = features.shape
    step = min(b, max(1, _CHUNK.get(features.device.type, 1 << 24) // max(c * d, 1)))
    room = features.new_empty((step, c, d), dtype=wide)
    for start in range(0, b, max(step, 1)):
        part = slice(start, start + step)
        spare = room[: min(b - start, step)]
        yield part, features[part] if features.dtype == wide else spare.copy_(features[part]), spare


def _safe(norm: Tensor) -> Tensor:
    """To divide by: a zero vector stays one."""
    return norm.masked_fill(norm == 0, 1.0)
