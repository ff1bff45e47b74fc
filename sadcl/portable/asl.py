"""The asymmetric loss in plain torch operators, on a CPU some images at a time: its many passes meet a cache then.

Nearly all labels of a multi-label batch are 0. Where the host may look (a CPU) every element is taken for a negative
first, by half of the formula, and the few others are done again by all of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._dtypes import accumulation_dtype

# Elements at a time on a CPU: few enough that six temporaries of as many stay in its caches, enough for all threads.
_CHUNK = 1 << 17
# Elements that are no plain negatives, at most one in so many, are done again; else all by the whole formula.
_RARE = 8


class _Terms(NamedTuple):
    """What value and derivatives share, any shape, in the accumulation dtype."""

    y: Tensor  # labels, 0 where ignored
    ignored: Tensor
    not_p: Tensor
    clipped: Tensor  # 1 - q
    log_p: Tensor
    log_q: Tensor
    log_likelihood: Tensor
    d_log_likelihood: Tensor  # by the logit
    base: Tensor
    d_base: Tensor  # by the logit
    gamma: Tensor | float
    weight: Tensor


def _terms(x: Any) -> _Terms:
    y = x.labels.to(accumulation_dtype(x.logits.dtype))
    logits = x.logits.to(y.dtype)
    ignored = y == -1
    if _perhaps(ignored):
        y = torch.where(ignored, 0.0, y)
        logits = torch.where(ignored, 0.0, logits)  # whatever an ignored place holds, NaN included
    opposite = -logits
    p, not_p = torch.sigmoid(logits), torch.sigmoid(opposite)
    slope = p * not_p
    floor = math.log(x.eps)
    log_p = logsigmoid(logits)
    if x.clip == 0:
        clipped, d_clipped, log_q, d_log_q = p, slope, logsigmoid(opposite), -p
    else:
        clipped = p.sub_(x.clip).clamp_(min=0.0)
        d_clipped = slope.masked_fill(clipped == 0, 0.0)
        q = (not_p + x.clip).clamp_(max=1.0)
        log_q, d_log_q = q.log(), (d_clipped / q).neg_()
    d_log_p, d_log_q = _above(floor, log_p, not_p), _above(floor, log_q, d_log_q)
    log_p, log_q = log_p.clamp_(min=floor), log_q.clamp_(min=floor)
    base = torch.lerp(clipped, not_p, y)
    same = x.gamma_pos == x.gamma_neg
    gamma = x.gamma_neg if same else y.mul(x.gamma_pos - x.gamma_neg).add_(x.gamma_neg)
    return _Terms(
        y, ignored, not_p, clipped, log_p, log_q, torch.lerp(log_q, log_p, y), torch.lerp(d_log_q, d_log_p, y), base,
        torch.lerp(d_clipped, -slope, y), gamma, torch.pow(base, gamma),  # 0 ** 0 is 1
    )  # fmt: skip


def _perhaps(mask: Tensor) -> bool:
    """Whether something is chosen, as far as that can be told without making a host wait."""
    return mask.device.type != "cpu" or bool(mask.any())


def _above(floor: float, logarithm: Tensor, derivative: Tensor) -> Tensor:
    """The derivative, 0 where the logarithm is held at the floor."""
    under = logarithm <= floor
    return derivative.masked_fill(under, 0.0) if _perhaps(under) else derivative


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.asl.Inputs`."""
    b, c = x.logits.shape
    acc = accumulation_dtype(x.logits.dtype)
    loss = x.logits.new_empty((b,) if x.sum_classes else (b, c), dtype=acc)
    slope = x.logits.new_empty((b, c) if x.save else (0, 0), dtype=acc)
    step = max(1, _CHUNK // max(c, 1)) if x.logits.device.type == "cpu" else max(b, 1)
    for start in range(0, b, step):
        part = slice(start, start + step)
        derivative = slope[part] if x.save else None
        gain = _elements(x._replace(logits=x.logits[part], labels=x.labels[part]), derivative)
        if x.class_weight is not None:
            gain *= x.class_weight
            if derivative is not None:
                derivative *= x.class_weight
        torch.neg(gain.sum(dim=1) if x.sum_classes else gain, out=loss[part])
    return {"loss": loss, "slope": slope}


def _elements(x: Any, slope: Tensor | None) -> Tensor:
    """Minus the loss of each element ``[b, C]``; the loss's derivative by the logits into ``slope``."""
    if x.logits.device.type == "cpu":
        others = x.labels.reshape(-1).nonzero().squeeze(1)
        usual = x.clip == 0 or x.clip > x.eps  # q is above the floor, or log q is told apart
        if usual and others.numel() * _RARE <= x.labels.numel():
            return _nearly_negative(x, others, slope)
    if _checks.reads_values(x.labels):
        _checks.check_soft_labels(x.labels)
    return _any_label(x, slope)


def _nearly_negative(x: Any, others: Tensor, slope: Tensor | None) -> Tensor:
    """The same where no labels but those at the places ``others`` are anything but 0."""
    gain = _negative(x, slope)
    if others.numel() > 0:
        few = x._replace(logits=x.logits.reshape(-1)[others], labels=x.labels.reshape(-1)[others])
        _checks.check_soft_labels(few.labels)
        derivative = None if slope is None else torch.empty_like(gain.view(-1)[others])
        gain.view(-1)[others] = _any_label(few, derivative)
        if slope is not None and derivative is not None:
            slope.view(-1)[others] = derivative
    return gain


def _negative(x: Any, slope: Tensor | None) -> Tensor:
    """The same where all labels are 0."""
    logits = x.logits.to(accumulation_dtype(x.logits.dtype)).contiguous()
    return (_without_margin if x.clip == 0 else _with_margin)(x, logits, -logits, slope)


def _with_margin(x: Any, logits: Tensor, opposite: Tensor, slope: Tensor | None) -> Tensor:
    p, not_p = torch.sigmoid(logits), opposite.sigmoid_()
    if slope is not None:
        torch.mul(p, not_p, out=slope)
    clipped = p.sub_(x.clip).clamp_(min=0.0)
    q = not_p.add_(x.clip).clamp_(max=1.0)
    log_q = q.log()
    if x.gamma_neg == 0:
        if slope is not None:
            slope.div_(q).masked_fill_(clipped == 0, 0.0)
        return log_q
    lower = _lower_power(clipped, x.gamma_neg)
    gain = (log_q * clipped).mul_(lower)
    if slope is not None:
        torch.div(clipped, q, out=q)
        if not x.detach_focal_weight:
            q.add_(log_q, alpha=-x.gamma_neg)
        slope.mul_(q).mul_(lower)
    return gain


def _without_margin(x: Any, logits: Tensor, opposite: Tensor, slope: Tensor | None) -> Tensor:
    p, log_q, floor = torch.sigmoid(logits), logsigmoid(opposite), math.log(x.eps)
    rise = p if slope is None else _above(floor, log_q, p)  # -d log q
    log_q = log_q.clamp_(min=floor)
    if x.gamma_neg == 0:
        if slope is not None:
            slope.copy_(rise)
        return log_q
    weight = _lower_power(p, x.gamma_neg) * p
    if slope is not None:
        if x.detach_focal_weight:
            torch.mul(rise, weight, out=slope)
        else:
            torch.mul(log_q, opposite.sigmoid_(), out=slope).mul_(-x.gamma_neg).add_(rise).mul_(weight)
    return log_q.mul_(weight)


def _lower_power(base: Tensor, gamma: float) -> Tensor:
    """``base ** (gamma - 1)``, 0 where the base is 0; usual powers by products."""
    if gamma not in (2, 3, 4, 5):
        return base.pow(gamma).div_(base.clamp(min=torch.finfo(base.dtype).tiny))
    power = base
    for _ in range(int(gamma) - 2):
        power = power * base if power is base else power.mul_(base)
    return power


def _any_label(x: Any, slope: Tensor | None) -> Tensor:
    """The same by the whole formula."""
    t = _terms(x)
    gain = t.log_likelihood * t.weight
    if slope is not None:
        t.d_log_likelihood.neg_()
        if not x.detach_focal_weight:
            # d(base ** gamma) as gamma * weight * d_base / base: finite where gamma < 1 and base is small; 0 where it
            # is 0, as d_base is then.
            relative = t.d_base.div_(t.base.clamp_(min=torch.finfo(t.base.dtype).tiny)).mul_(t.log_likelihood)
            t.d_log_likelihood.sub_(relative.mul_(t.gamma))
        torch.mul(t.d_log_likelihood, t.weight, out=slope)
        if _perhaps(t.ignored):
            slope.masked_fill_(t.ignored, 0.0)
    return gain.masked_fill_(t.ignored, 0.0) if _perhaps(t.ignored) else gain


def backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits."""
    torch.mul(_of_elements(upstream), saved.slope, out=out.grad_logits)


def rare_gradients(upstream: Any, x: Any, out: Any) -> None:
    """Fill the gradients of soft labels ``[B, C]`` and of class weights ``[C]`` (0 at ignored places)."""
    t = _terms(x)
    given = torch.where(t.ignored, 0.0, _of_elements(upstream).to(t.y.dtype))
    if out.grad_class_weight is not None:
        out.grad_class_weight.copy_((given * -t.log_likelihood * t.weight).sum(dim=0))
    if out.grad_labels is not None:
        by_label = -(t.log_p - t.log_q) * t.weight
        if not x.detach_focal_weight:
            safe = torch.where(t.base > 0, t.base, 1.0)
            d_weight = (x.gamma_pos - x.gamma_neg) * safe.log() + t.gamma * (t.not_p - t.clipped) / safe
            by_label = by_label - t.log_likelihood * torch.where(t.base > 0, t.weight * d_weight, 0.0)
        weight = 1.0 if x.class_weight is None else x.class_weight.to(t.y.dtype)
        out.grad_labels.copy_(given * weight * by_label)


def _of_elements(upstream: Any) -> Tensor:
    grad = upstream.grad_loss
    return grad[:, None] if grad.dim() == 1 else grad
