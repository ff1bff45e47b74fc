"""Op ``asl``: asymmetric loss, value and derivative in one sweep; of every element, or summed over classes.

Everything is in log-sigmoid form and float32 (float64 for float64 logits), so logits of +-1e4 stay finite in any dtype.
Oracle: :func:`sadcl.reference.asl.asl`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._dtypes import accumulation_dtype
from ._library import (
    array,
    call,
    extension,
    implemented,
    refuse_second_derivative,
    register,
    register_autograd,
    triton_kernel,
)


@dataclass(frozen=True)
class Focus:
    """The constants of the loss, see the oracle."""

    gamma_neg: float
    gamma_pos: float
    clip: float
    eps: float
    detach_focal_weight: bool


def _allocate(logits: Tensor, sum_classes: bool, save: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (loss, grad); grad is empty if nothing will be differentiated."""
    acc = accumulation_dtype(logits.dtype)
    loss_shape = logits.shape[:1] if sum_classes else logits.shape
    return logits.new_empty(loss_shape, dtype=acc), logits.new_empty(logits.shape if save else (0, 0), dtype=acc)


def _fake(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detach_focal_weight: bool,
    sum_classes: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _allocate(logits, sum_classes, save)


def _cpp(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detach_focal_weight: bool,
    sum_classes: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    loss, grad = _allocate(logits, sum_classes, save)
    if class_weight is not None:
        class_weight = class_weight.to(loss.dtype).contiguous()
    allowed = extension().asl_forward(
        array(logits), array(labels), None if class_weight is None else array(class_weight),
        gamma_neg, gamma_pos, clip, eps, detach_focal_weight, array(loss), array(grad), torch.get_num_threads(),
    )  # fmt: skip
    if not allowed:
        _checks.check_soft_labels(labels)
    return loss, grad


def _torch(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detach_focal_weight: bool,
    sum_classes: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    if _checks.reads_values(labels):
        _checks.check_soft_labels(labels)
    x = logits.to(accumulation_dtype(logits.dtype))
    y = labels.to(x.dtype)
    ignored = y == -1
    y = torch.where(ignored, 0.0, y)
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    clipped = (p - clip).clamp(min=0.0)  # 1 - q
    slope = p * not_p
    floor = math.log(eps)

    log_p = logsigmoid(x)
    d_log_p = torch.where(log_p > floor, not_p, 0.0)
    if clip == 0:
        log_q, d_log_q = logsigmoid(-x), -p
    else:
        q = (not_p + clip).clamp(max=1.0)
        log_q, d_log_q = torch.log(q), torch.where(clipped > 0, -slope / q, 0.0)
    d_log_q = torch.where(log_q > floor, d_log_q, 0.0)

    log_likelihood = y * log_p.clamp(min=floor) + (1 - y) * log_q.clamp(min=floor)
    base = y * not_p + (1 - y) * clipped
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    weight = torch.pow(base, gamma)  # 0 ** 0 is 1
    loss = -log_likelihood * weight
    grad = -(y * d_log_p + (1 - y) * d_log_q) * weight
    if not detach_focal_weight:
        d_base = torch.where(clipped > 0, (1 - y) * slope, 0.0) - y * slope
        # d(base ** gamma) as gamma * weight * d_base / base: finite where gamma < 1 and base is small.
        relative = torch.where(base > 0, d_base / base, 0.0)
        grad = grad - log_likelihood * gamma * weight * relative
    scale = ~ignored if class_weight is None else torch.where(ignored, 0.0, class_weight.to(x.dtype))
    loss, grad = scale * loss, scale * grad
    grad = grad.contiguous() if save else grad.new_empty(0, 0)
    return loss.sum(dim=1) if sum_classes else loss.contiguous(), grad


def _backward_fake(grad_loss: Tensor, grad: Tensor, logits: Tensor, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_cpp(grad_loss: Tensor, grad: Tensor, logits: Tensor) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    extension().asl_backward(array(grad_loss), array(grad), array(grad_logits), torch.get_num_threads())
    return grad_logits


def _backward_torch(grad_loss: Tensor, grad: Tensor, logits: Tensor) -> Tensor:
    upstream = grad_loss if grad_loss.dim() == 2 else grad_loss[:, None]
    return (upstream * grad).to(logits.dtype).contiguous()


_IMPLEMENTATIONS = {"cpp": _cpp, "triton": triton_kernel("asl", "asl"), "torch": _torch}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "asl",
    "(Tensor logits, Tensor labels, Tensor? class_weight, float gamma_neg, float gamma_pos, float clip, float eps,"
    " bool detach_focal_weight, bool sum_classes, bool save, str backend) -> (Tensor, Tensor)",
    _IMPLEMENTATIONS,
    _fake,
)
register(
    "asl_backward",
    "(Tensor grad_loss, Tensor grad, Tensor logits, str backend) -> Tensor",
    {"cpp": _backward_cpp, "triton": triton_kernel("asl", "asl_backward"), "torch": _backward_torch},
    _backward_fake,
)
refuse_second_derivative("asl_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.backend = inputs[-1]


def _autograd(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = call("asl_backward", grad_loss, *ctx.saved_tensors, ctx.backend)
    return grad_logits, *(None,) * 10


register_autograd("asl", _autograd, _setup_context)


def asl(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, focus: Focus, sum_classes: bool, backend: str
) -> Tensor:
    """Weighted loss of every element ``[B, C]``, or of every image ``[B]``, in the accumulation dtype.

    Args:
        logits: ``[B, C]``.
        labels: ``[B, C]`` in [0, 1], or -1 for ignored.
        class_weight: ``[C]`` or ``None``.
        focus: the loss's constants.
        sum_classes: sum over the classes.
        backend: a name out of :data:`IMPLEMENTED`.
    """
    save = torch.is_grad_enabled() and logits.requires_grad
    return call(
        "asl", logits, labels, class_weight, float(focus.gamma_neg), float(focus.gamma_pos), float(focus.clip),
        float(focus.eps), focus.detach_focal_weight, sum_classes, save, backend,
    )[0]  # fmt: skip
