"""SSCL and PSCL of one batch together: the features are read where they are, and get one gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import _checks as check
from .._backends import resolve
from ..ops import dual as _dual
from ..ops.compact import Active
from . import _arguments as arguments
from ._reduce import reduce
from .sscl import (
    FORMULATIONS,
    check_active,
    prototype_contrastive_loss,
    released_anchors,
    sample_contrastive_loss,
)


class DualParts(NamedTuple):
    """The two contrastive losses of a batch, 0-d tensors, unweighted."""

    sample: Tensor
    prototype: Tensor


def dual_contrastive_loss(
    embeddings: Tensor,
    bank_embeddings: Tensor | None,
    prototypes: Tensor,
    labels: Tensor,
    *,
    sample_temperature: float | Tensor = 0.2,
    prototype_temperature: float | Tensor = 0.07,
    formulation: str = "paper",
    class_weight: Tensor | None = None,
    active: Active | None = None,
    backend: str | None = None,
) -> DualParts:
    """SSCL between the views and PSCL of the first view, with ``reduction="mean"``.

    The values and gradients are those of :func:`sadcl.functional.sample_contrastive_loss` on
    ``stack([embeddings, bank_embeddings], dim=1)`` and of :func:`sadcl.functional.prototype_contrastive_loss`. The C++
    backend makes no stacked copy, and both losses write one gradient buffer.

    Source: SADCL (ECAI 2023), L_SSCL and L_PSCL.

    Args:
        embeddings: ``[B, C, D]``, the batch's own view; float32, bfloat16, float16 or float64.
        bank_embeddings: ``[B, C, D]``, the second view; ``None`` leaves one view.
        prototypes: ``[C, D]`` or ``[1, C, D]``.
        labels: ``[B, C]``: 1 active, 0 not, -1 ignored.
        sample_temperature: number > 0, or a tensor of one element, which receives a gradient.
        prototype_temperature: the same, of PSCL.
        formulation: ``"paper"`` or ``"released"``, for both.
        class_weight: ``[C]``, for both.
        active: :func:`compact_labels` of these labels.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`DualParts`, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperatures or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check.check_tensor("embeddings", embeddings, (3,), "[B, C, D]")
    check.check_floating("embeddings", embeddings)
    check.check_nonempty("embeddings", embeddings)
    if bank_embeddings is not None:
        bank_embeddings = _check_bank(bank_embeddings, embeddings)
    b, c, _ = embeddings.shape
    arguments.check_labels(labels, b, c, embeddings, other="embeddings")
    check.check_choice("formulation", formulation, FORMULATIONS)
    active = check_active(active, labels, backend)
    name = resolve(backend, "dual", embeddings.device, _dual.ALSO_COMPOSED)

    if name not in _dual.IMPLEMENTED:
        same: dict[str, Any] = {
            "formulation": formulation,
            "class_weight": class_weight,
            "active": active,
            "backend": name,
        }
        views = _dual.stacked(embeddings, bank_embeddings)
        return DualParts(
            sample_contrastive_loss(views, labels, temperature=sample_temperature, **same),
            prototype_contrastive_loss(embeddings, prototypes, labels, temperature=prototype_temperature, **same),
        )

    prototypes = arguments.check_prototypes(prototypes, embeddings)
    released = formulation == "released"
    rows, classes = _dual.dual(
        _dual.Inputs(embeddings, bank_embeddings, prototypes, *active),
        check.as_temperature(sample_temperature, embeddings),
        check.as_temperature(prototype_temperature, embeddings),
        released,
        name,
    )
    count = active.class_ptr[-1]
    if released:
        rows = rows * released_anchors(active.target, rows.shape[1])
        classes = classes * (count > 0)
    return DualParts(
        reduce(arguments.weighted(rows, class_weight, None), count * rows.shape[1], "mean"),
        reduce(arguments.weighted(classes, class_weight, None), count, "mean"),
    )


def _check_bank(bank: Tensor, embeddings: Tensor) -> Tensor:
    check.check_tensor("bank_embeddings", bank, (3,), "[B, C, D]")
    if bank.shape != embeddings.shape:
        raise ValueError(
            f"bank_embeddings: expected embeddings' shape {tuple(embeddings.shape)}, got {tuple(bank.shape)}"
        )
    check.check_same_device("bank_embeddings", bank, "embeddings", embeddings)
    if bank.dtype != embeddings.dtype:
        raise TypeError(f"bank_embeddings: expected embeddings' dtype {embeddings.dtype}, got {bank.dtype}")
    return bank
