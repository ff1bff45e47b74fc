"""The two-way multi-label loss as a function."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from .._dtypes import accumulation_dtype
from ..ops import two_way as _two_way
from . import _arguments as arguments
from ._reduce import REDUCTIONS
from .zlpr import check_logits, check_values

BACKENDS = _two_way.two_way.backends


def two_way_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    positive_temperature: float = 4.0,
    negative_temperature: float = 1.0,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Two-way multi-label loss: every image's logits are contrasted, and every class's.

    Of each row with a positive, and alike of each column, with log-sum-exps over its negatives and its positives:

        l = softplus( Tn lse_neg(x / Tn) + Tp lse_pos(-x / Tp) )

    Source: Two-way Multi-Label Loss (CVPR 2023), eqs. 7 and 8.

    Args:
        logits: ``[B, C]``; float32, bfloat16, float16 or float64; any strides.
        labels: ``[B, C]``, any real dtype: 1, 0 or -1 (ignored: in no sum).
        positive_temperature, negative_temperature: numbers > 0, ``Tp`` and ``Tn``.
        reduction: ``"mean"`` (over the rows with a positive, plus the same over columns), ``"sum"`` (of both), or
            ``"none"``: the pair (rows ``[B]``, columns ``[C]``), 0 where there is no positive.
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a column.
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the loss of a row.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 logits): a 0-d tensor, or the pair.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperatures or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check_logits(logits, labels)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tp = check.positive_number("positive_temperature", positive_temperature)
    tn = check.positive_number("negative_temperature", negative_temperature)
    weights = arguments.check_weights(class_weight, sample_weight, logits.shape[0], logits.shape[1], logits)
    name = resolve(backend, "two_way", logits.device, BACKENDS)
    if name == "reference":
        check_values(labels)
        acc = accumulation_dtype(logits.dtype)
        rows, columns = (loss.to(acc) for loss in reference.two_way(logits, labels, tp, tn))
    else:
        out = _two_way.two_way(_two_way.Inputs(logits, labels, tp, tn), name)
        rows, columns = out.row_loss, out.class_loss
    if weights.of_sample is not None:
        rows = rows * weights.of_sample
    columns = weights.by_class(columns)
    if reduction == "none":
        return rows, columns
    if reduction == "sum":
        return rows.sum() + columns.sum()
    positive = labels == 1
    counts = [positive.any(dim=dim).sum().clamp(min=1) for dim in (1, 0)]
    return rows.sum() / counts[0] + columns.sum() / counts[1]
