"""The asymmetric loss in plain torch operators, on a CPU some images at a time: its many passes meet a cache then."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._dtypes import accumulation_dtype


class _Terms(NamedTuple):
    """What value and derivatives share, ``[B, C]`` in the accumulation dtype."""

    y: Tensor  # labels, 0 where ignored
    ignored: Tensor
    not_p: Tensor
    clipped: Tensor  # 1 - q
    slope: Tensor  # dp / dlogit
    d_clipped: Tensor  # d clipped / dlogit
    log_p: Tensor
    log_q: Tensor
    d_log_p: Tensor
    d_log_q: Tensor
    base: Tensor
    gamma: Tensor
    weight: Tensor


def _terms(x: Any) -> _Terms:
    y = x.labels.to(accumulation_dtype(x.logits.dtype))
    logits = x.logits.to(y.dtype)
    ignored = y == -1
    if _perhaps(ignored):
        y = torch.where(ignored, 0.0, y)
        logits = torch.where(ignored, 0.0, logits)  # whatever an ignored place holds, NaN included
    p, not_p = torch.sigmoid(logits), torch.sigmoid(-logits)
    clipped = (p - x.clip).clamp(min=0.0)
    slope = p * not_p
    floor = math.log(x.eps)
    log_p = logsigmoid(logits)
    if x.clip == 0:
        d_clipped, log_q, d_log_q = slope, logsigmoid(-logits), -p
    else:
        q = (not_p + x.clip).clamp(max=1.0)
        d_clipped = torch.where(clipped > 0, slope, 0.0)
        log_q, d_log_q = torch.log(q), -d_clipped / q
    d_log_p, d_log_q = _above(floor, log_p, not_p), _above(floor, log_q, d_log_q)
    base = y * not_p + (1 - y) * clipped
    gamma = x.gamma_pos * y + x.gamma_neg * (1 - y)
    weight = torch.pow(base, gamma)  # 0 ** 0 is 1
    log_p, log_q = log_p.clamp(min=floor), log_q.clamp(min=floor)
    return _Terms(y, ignored, not_p, clipped, slope, d_clipped, log_p, log_q, d_log_p, d_log_q, base, gamma, weight)


def _perhaps(mask: Tensor) -> bool:
    """Whether something is chosen, as far as that can be told without making a host wait."""
    return mask.device.type != "cpu" or bool(mask.any())


def _above(floor: float, logarithm: Tensor, derivative: Tensor) -> Tensor:
    """The derivative, 0 where the logarithm is held at the floor."""
    under = logarithm <= floor
    return derivative.masked_fill(under, 0.0) if _perhaps(under) else derivative


# Elements at a time on a CPU: a few temporaries of as many stay in its second-level cache.
_CHUNK = 1 << 15


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.asl.Inputs`."""
    parts = _chunks(x.logits)
    made = [_forward(x._replace(logits=x.logits[part], labels=x.labels[part])) for part in parts]
    if len(made) == 1:
        return made[0]
    loss, slope = (torch.cat([part[name] for part in made]) for name in ("loss", "slope"))
    return {"loss": loss, "slope": slope if x.save else loss.new_empty(0, 0)}


def _chunks(logits: Tensor) -> list[slice]:
    b, c = logits.shape
    step = max(1, _CHUNK // max(c, 1)) if logits.device.type == "cpu" else max(b, 1)
    return [slice(start, start + step) for start in range(0, max(b, 1), step)]


def _forward(x: Any) -> dict[str, Tensor]:
    if _checks.reads_values(x.labels):
        _checks.check_soft_labels(x.labels)
    t = _terms(x)
    log_likelihood = t.y * t.log_p + (1 - t.y) * t.log_q
    scale = ~t.ignored if x.class_weight is None else torch.where(t.ignored, 0.0, x.class_weight.to(t.y.dtype))
    loss = scale * (-log_likelihood * t.weight)
    loss = loss.sum(dim=1) if x.sum_classes else loss.contiguous()
    if not x.save:
        return {"loss": loss, "slope": loss.new_empty(0, 0)}
    slope = -(t.y * t.d_log_p + (1 - t.y) * t.d_log_q) * t.weight
    if not x.detach_focal_weight:
        d_base = (1 - t.y) * t.d_clipped - t.y * t.slope
        # d(base ** gamma) as gamma * weight * d_base / base: finite where gamma < 1 and base is small; 0 where it is 0,
        # as d_base is then.
        relative = d_base / t.base.clamp(min=torch.finfo(t.base.dtype).tiny)
        slope = slope - log_likelihood * t.gamma * t.weight * relative
    return {"loss": loss, "slope": (scale * slope).contiguous()}


def backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits."""
    torch.mul(_of_elements(upstream), saved.slope, out=out.grad_logits)


def rare_gradients(upstream: Any, x: Any, out: Any) -> None:
    """Fill the gradients of soft labels ``[B, C]`` and of class weights ``[C]`` (0 at ignored places)."""
    t = _terms(x)
    given = torch.where(t.ignored, 0.0, _of_elements(upstream).to(t.y.dtype))
    log_likelihood = t.y * t.log_p + (1 - t.y) * t.log_q
    if out.grad_class_weight is not None:
        out.grad_class_weight.copy_((given * -log_likelihood * t.weight).sum(dim=0))
    if out.grad_labels is not None:
        by_label = -(t.log_p - t.log_q) * t.weight
        if not x.detach_focal_weight:
            safe = torch.where(t.base > 0, t.base, 1.0)
            d_weight = (x.gamma_pos - x.gamma_neg) * safe.log() + t.gamma * (t.not_p - t.clipped) / safe
            by_label = by_label - log_likelihood * torch.where(t.base > 0, t.weight * d_weight, 0.0)
        weight = 1.0 if x.class_weight is None else x.class_weight.to(t.y.dtype)
        out.grad_labels.copy_(given * weight * by_label)


def _of_elements(upstream: Any) -> Tensor:
    grad = upstream.grad_loss
    return grad[:, None] if grad.dim() == 1 else grad
