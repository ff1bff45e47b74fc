"""The classification loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from .._dtypes import accumulation_dtype
from ..ops import asl as _asl
from . import _arguments as arguments
from ._reduce import REDUCTIONS, Weights, reduce

BACKENDS = _asl.asl.backends


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_neg: float = 4,
    gamma_pos: float = 1,
    clip: float = 0.05,
    eps: float = 1e-8,
    detach_focal_weight: bool = False,
    reduction: str = "sum",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Asymmetric loss (ASL) for multi-label classification.

    With ``p = sigmoid(logit)`` and ``q = min(1 - p + clip, 1)``, per element

        -( y log max(p, eps) + (1 - y) log max(q, eps) ) * (1 - p y - q (1 - y)) ^ (gamma_pos y + gamma_neg (1 - y))

    Finite for logits of +-1e4 in every dtype; where a probability is under ``eps`` its logarithm is ``log eps`` with
    gradient 0.

    Source: Asymmetric Loss For Multi-Label Classification (ICCV 2021), eqs. 4 to 7.

    Args:
        logits: ``[B, C]``; float32, bfloat16, float16 or float64.
        labels: ``[B, C]`` in [0, 1] (soft labels allowed), or -1 (ignored).
        gamma_neg: exponent >= 0 on negatives.
        gamma_pos: exponent >= 0 on positives.
        clip: probability margin in [0, 1).
        eps: floor of the probabilities, in (0, 1).
        detach_focal_weight: no gradient through the factor with the exponents.
        reduction: ``"sum"``, ``"mean"`` (over the elements that are not ignored), ``"none"`` (``[B, C]``) or
            ``"released"`` (``sum / B / C * 1000``).
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the elements of a class.
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the elements of an image.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 logits): a 0-d tensor, or ``[B, C]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, constants or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check.check_tensor("logits", logits, (2,), "[B, C]")
    check.check_floating("logits", logits)
    check.check_nonempty("logits", logits)
    b, c = logits.shape
    arguments.check_labels(labels, b, c, logits, other="logits")
    check.check_choice("reduction", reduction, (*REDUCTIONS, "released"))
    focus = arguments.check_focus(gamma_neg, gamma_pos, clip, eps)
    weights = arguments.check_weights(class_weight, sample_weight, b, c, logits)
    name = resolve(backend, "asl", logits.device, BACKENDS, (b, c))

    by_image = reduction != "none"
    if name == "reference":
        if check.reads_values(labels) and check.holds_values(labels):
            check.check_soft_labels(labels)
        loss = reference.asl(logits, labels, *focus, detach_focal_weight)
        loss = weights.by_class(loss.to(accumulation_dtype(logits.dtype)))
        loss = loss.sum(dim=1) if by_image else loss
    else:
        save = torch.is_grad_enabled() and logits.requires_grad
        x = _asl.Inputs(logits, labels, weights.of_class, *focus, detach_focal_weight, by_image, save)
        if name == "cuda" and by_image and weights.of_sample is None and _asl.are_few(b, c):
            loss = _asl.asl_total(x, name).loss
        else:
            loss = _asl.asl(x, name).loss
    loss = Weights(None, weights.of_sample).apply(loss)
    if reduction == "none":
        return loss
    if reduction == "sum":  # before the labels are counted, which costs a fourth of the loss
        return loss if loss.dim() == 0 else loss.sum()
    if reduction == "released":
        return loss.sum() / b / c * 1000.0
    return reduce(loss, (labels != -1).count_nonzero(), "mean")
