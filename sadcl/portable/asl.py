"""The asymmetric loss in plain torch operators."""

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
    log_p: Tensor
    log_q: Tensor
    d_log_p: Tensor
    d_log_q: Tensor
    base: Tensor
    gamma: Tensor
    weight: Tensor


def _terms(x: Any) -> _Terms:
    y = x.labels.to(accumulation_dtype(x.logits.dtype))
    ignored = y == -1
    y = torch.where(ignored, 0.0, y)
    logits = torch.where(ignored, 0.0, x.logits.to(y.dtype))  # whatever an ignored place holds, NaN included
    p, not_p = torch.sigmoid(logits), torch.sigmoid(-logits)
    clipped = (p - x.clip).clamp(min=0.0)
    slope = p * not_p
    floor = math.log(x.eps)
    log_p = logsigmoid(logits)
    d_log_p = torch.where(log_p > floor, not_p, 0.0)
    if x.clip == 0:
        log_q, d_log_q = logsigmoid(-logits), -p
    else:
        q = (not_p + x.clip).clamp(max=1.0)
        log_q, d_log_q = torch.log(q), torch.where(clipped > 0, -slope / q, 0.0)
    d_log_q = torch.where(log_q > floor, d_log_q, 0.0)
    base = y * not_p + (1 - y) * clipped
    gamma = x.gamma_pos * y + x.gamma_neg * (1 - y)
    weight = torch.pow(base, gamma)  # 0 ** 0 is 1
    log_p, log_q = log_p.clamp(min=floor), log_q.clamp(min=floor)
    return _Terms(y, ignored, not_p, clipped, slope, log_p, log_q, d_log_p, d_log_q, base, gamma, weight)


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.asl.Inputs`."""
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
        d_base = torch.where(t.clipped > 0, (1 - t.y) * t.slope, 0.0) - t.y * t.slope
        # d(base ** gamma) as gamma * weight * d_base / base: finite where gamma < 1 and base is small.
        relative = torch.where(t.base > 0, d_base / t.base, 0.0)
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
    return grad if grad.dim() == 2 else grad[:, None]
