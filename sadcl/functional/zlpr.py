"""The zero-bounded log-sum-exp loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from .._dtypes import accumulation_dtype
from ..ops import zlpr as _zlpr
from . import _arguments as arguments
from ._reduce import REDUCTIONS, Weights

BACKENDS = _zlpr.zlpr.backends


def zlpr_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Zero-bounded log-sum-exp and pairwise rank-based loss (ZLPR) for multi-label classification.

        l_b = log(1 + sum over negatives of exp(x_bc)) + log(1 + sum over positives of exp(-x_bc))

    A class is predicted where its logit is above 0. Finite for logits of +-1e4 in every dtype.

    Source: ZLPR (arXiv 2208.02955), eq. 5.

    Args:
        logits: ``[B, C]``; float32, bfloat16, float16 or float64; any strides.
        labels: ``[B, C]``, any real dtype: 1, 0 or -1 (ignored: in neither sum).
        reduction: ``"mean"`` (over images), ``"sum"`` or ``"none"`` (``[B]``).
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the loss of an image.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 logits): a 0-d tensor, or ``[B]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check_logits(logits, labels)
    check.check_choice("reduction", reduction, REDUCTIONS)
    weights = arguments.check_weights(None, sample_weight, logits.shape[0], None, logits)
    name = resolve(backend, "zlpr", logits.device, BACKENDS)
    if name == "reference":
        check_values(labels)
        rows = reference.zlpr(logits, labels).to(accumulation_dtype(logits.dtype))
    else:
        rows = _zlpr.zlpr(_zlpr.Inputs(logits, labels), name).row_loss
    rows = Weights(None, weights.of_sample).apply(rows)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse what no loss of logits ``[B, C]`` with hard labels can be of."""
    check.check_tensor("logits", logits, (2,), "[B, C]")
    check.check_floating("logits", logits)
    check.check_nonempty("logits", logits)
    b, c = logits.shape
    arguments.check_labels(labels, b, c, logits, other="logits")
    check.check_real("labels", labels)


def check_values(labels: Tensor) -> None:
    """What the other backends do inside the op."""
    if check.reads_values(labels) and not torch.compiler.is_compiling():
        check.check_label_values(labels)
