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
    _checks.check_positive("temperature", temperature)
    no_positive, ignored = x.target != 1, _ignored(x.target)
    wide = norm_dtype(features.device)
    norm_p, _, unit = _unit(x.prototypes, wide)
    norms, dots = [], []
    for _, z, spare in _chunks(features, wide):
        norms.append(torch.linalg.vector_norm(z, dim=-1))
        dots.append(torch.mul(z, unit, out=spare).sum(dim=-1))
    norm_x, score = _joined(norms), _joined(dots)
    if ignored is not None:
        norm_x.masked_fill_(ignored, 0.0)
    score *= _inverse(norm_x)
    score /= temperature
    there = score if ignored is None else score.masked_fill(ignored, float("-inf"))
    lse = torch.logsumexp(there, 0), torch.logsumexp(score.masked_fill(no_positive, float("-inf")), 0)
    absent = no_positive.all(dim=0)
    class_loss = (lse[0] - lse[1]).masked_fill_(absent & ~lse[0].isnan(), 0.0)
    if x.released and there.shape[0] > 0:
        absent = absent if ignored is None else absent & ~ignored.all(dim=0)
        class_loss = torch.where(absent, lse[0] - there.amax(dim=0), class_loss)
    class_loss = class_loss.to(accumulation_dtype(features.dtype))
    return {"class_loss": class_loss, "score": score, "norm_x": norm_x, "norm_p": norm_p, "lse": torch.stack(lse)}


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of features, prototypes and temperature."""
    features, temperature = x.features, x.temperature
    score, (of_all, of_positive) = saved.score, saved.lse
    no_positive, ignored = x.target != 1, _ignored(x.target)
    # dL/ds = G (softmax over the valid images - softmax over the positive ones)
    grad_score = (score - of_all).exp_().sub_((score - of_positive).exp_().masked_fill_(no_positive, 0.0))
    if not x.released:
        grad_score.masked_fill_(no_positive.all(dim=0), 0.0)
    grad_score *= upstream.grad_class_loss
    if ignored is not None:
        score, grad_score = score.masked_fill(ignored, 0.0), grad_score.masked_fill_(ignored, 0.0)
    wide = score.dtype
    # With u = p / |p|, z = x / |x|, k = dL/dcos: dL/dx = k (u - cos z) / |x|, 0 for zero vectors, and
    # dL/du = sum k (z - cos u): two factors a row, and one number a class.
    pulled = (grad_score * score).neg_()  # -k cos
    of_class = pulled.sum(dim=0)
    inverse = _inverse(saved.norm_x)
    across = pulled.mul_(inverse).mul_(inverse)[..., None]
    along = inverse.mul_(grad_score).div_(temperature)[..., None]
    _, inverse_p, unit = _unit(x.prototypes, wide)
    grad_unit = unit * of_class[:, None]
    grad_features = None
    for part, z, spare in _chunks(features, wide):
        if ignored is not None:
            z = z.masked_fill(ignored[part][..., None], 0.0)
        if z.device.type != "cpu":
            grad_unit += torch.einsum("bc,bcd->cd", along[part][..., 0], z)
        elif z.shape[0] == 1:
            grad_unit.addcmul_(z[0], along[part][0])
        else:
            grad_unit += (z * along[part]).sum(dim=0)  # a CPU's einsum copies each class
        torch.mul(z, across[part], out=spare).addcmul_(along[part], unit)
        if spare.shape[0] == features.shape[0]:
            grad_features = spare.to(features.dtype)
        else:
            grad_features = features.new_empty(features.shape) if grad_features is None else grad_features
            grad_features[part] = spare
    return {
        "grad_features": grad_features,
        "grad_prototypes": grad_unit.mul_(inverse_p).to(x.prototypes.dtype),
        "grad_temperature": (of_class.sum() / temperature).to(temperature.dtype),
    }


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ignored(target: Tensor) -> Tensor | None:
    """Which pairs take no part; None where a CPU sees that all do."""
    ignored = target == -1
    return ignored if target.device.type != "cpu" or bool(ignored.any()) else None


def _unit(rows: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Norms ``[C]``, their inverses ``[C, 1]`` and unit vectors ``[C, D]``."""
    rows = rows.to(wide)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    inverse = _inverse(norm)[:, None]
    return norm, inverse, rows * inverse


def _inverse(norm: Tensor) -> Tensor:
    """0 for a zero vector's, which stays one."""
    return norm.reciprocal().masked_fill_(norm == 0, 0.0)


def _chunks(features: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some images at a time ``[b, C, D]`` in the wide dtype, and as much room, which may be the same."""
    b, c, d = features.shape
    step = max(1, _CHUNK.get(features.device.type, 1 << 24) // max(c * d, 1))
    room = features.new_empty((min(b, step), c, d), dtype=wide)
    for start in range(0, max(b, 1), step):
        part = slice(start, start + step)
        spare = room if b - start >= step or start == 0 else room[: b - start]
        here = features if b <= step else features[part]
        yield part, here if features.dtype == wide else spare.copy_(here), spare
