"""SSCL and PSCL of one batch together: the features are read where they are, and get one gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import _checks as check
from .._backends import resolve
from .._groups import GroupLike
from ..ops import dual as _dual
from ..ops import dual_mean as _dual_mean
from ..ops import sscl as _sscl
from ..ops.compact import Active
from . import _arguments as arguments
from . import pscl, sscl
from ._arguments import FORMULATIONS
from ._group import check_backend, check_capacity, check_features, check_ring, over_group, together
from ._reduce import Weights
from .compact import check_active

BACKENDS = sscl.BACKENDS  # here, or as the two ops


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
    group: GroupLike = None,
    ring: bool = False,
    capacity: int | None = None,
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
        class_weight: ``[C]`` of finite numbers >= 0, for both.
        active: :func:`compact_labels` of these labels.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.
        group, ring, capacity: over the ranks of a process group, for both, as :func:`sample_contrastive_loss` says.

    Returns:
        :class:`DualParts`, float32 (float64 for float64 embeddings).

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperatures or choices.
        RuntimeError: a backend asked for by name cannot run.
    """

    def checked() -> tuple[Tensor | None, Tensor, Tensor, Tensor, Weights, str]:
        return _check(
            embeddings, bank_embeddings, prototypes, labels, sample_temperature, prototype_temperature, formulation,
            class_weight, backend, group, ring, capacity,
        )  # fmt: skip

    bank_embeddings, prototypes, sample_temperature, prototype_temperature, weights, name = together(
        group, embeddings, checked
    )
    over = over_group(group, embeddings.shape[0])
    plain = formulation == "paper" and class_weight is None and active is None and over is None
    if name == "cuda" and plain and bank_embeddings is not None and _dual_mean.serves(embeddings):
        temperatures = (sample_temperature, prototype_temperature)
        means = _dual_mean.dual_mean(
            _dual_mean.Inputs(embeddings, bank_embeddings, prototypes, labels, *temperatures), name
        )
        return DualParts(means.sample, means.prototype)
    if over is not None or name not in _dual.dual.backends:
        active = together(group, embeddings, lambda: check_active(active, labels, name))
        same: dict[str, Any] = {"formulation": formulation, "class_weight": class_weight, "active": active}
        views = _dual.stacked(embeddings, bank_embeddings)
        if over is not None:
            sample = sscl.sample_contrastive_loss(
                views, labels, temperature=sample_temperature, backend=backend, group=group, ring=ring,
                capacity=capacity, **same,
            )  # fmt: skip
            checked_pscl = pscl.Checked(
                arguments.in_range(embeddings), arguments.in_range(prototypes), prototype_temperature, weights, active,
                resolve(backend, "pscl", embeddings.device, pscl.BACKENDS),
            )  # fmt: skip
            released = formulation == "released"
            return DualParts(sample, pscl.over_ranks(checked_pscl, over, released, "mean", after=sample))
        same["backend"] = name
        return DualParts(
            sscl.sample_contrastive_loss(views, labels, temperature=sample_temperature, **same),
            pscl.prototype_contrastive_loss(embeddings, prototypes, labels, temperature=prototype_temperature, **same),
        )

    x = _dual.Inputs(
        arguments.in_range(embeddings),
        None if bank_embeddings is None else arguments.in_range(bank_embeddings),
        arguments.in_range(prototypes),
        *(active := check_active(active, labels, name)),
        sample_temperature=sample_temperature,
        prototype_temperature=prototype_temperature,
        released=formulation == "released",
        mean=formulation == "paper" and not weights.given,
        keep=0,
    )
    keep = _sscl.scores_to_keep(_dual.views_of(x), x.pairs, x.class_ptr, x.sample_temperature, name)
    out = _dual.dual(x._replace(keep=keep), name)
    if x.mean:
        return DualParts(out.sample, out.prototype)
    return DualParts(
        sscl.finish(out.sample, active, x.released, None, weights, "mean"),
        pscl.finish(out.prototype, active, x.released, weights, "mean"),
    )


def _check(
    embeddings: Tensor,
    bank_embeddings: Tensor | None,
    prototypes: Tensor,
    labels: Tensor,
    sample_temperature: float | Tensor,
    prototype_temperature: float | Tensor,
    formulation: str,
    class_weight: Tensor | None,
    backend: str | None,
    group: GroupLike,
    ring: bool,
    capacity: int | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Weights, str]:
    check_features("embeddings", embeddings, (3,), "[B, C, D]", group)
    check_ring(ring, group)
    check_capacity(capacity, group)
    bank = None if bank_embeddings is None else _check_bank(bank_embeddings, embeddings)
    b, c, _ = embeddings.shape
    arguments.check_labels(labels, b, c, embeddings, other="embeddings")
    prototypes = arguments.check_prototypes(prototypes, embeddings, other="embeddings")
    check.check_choice("formulation", formulation, FORMULATIONS)
    sample = check.as_temperature(sample_temperature, embeddings, "sample_temperature")
    prototype = check.as_temperature(prototype_temperature, embeddings, "prototype_temperature")
    weights = arguments.check_weights(class_weight, None, b, c, embeddings)
    if over_group(group, b) is not None:
        name = check_backend(backend, "dual", embeddings.device, formulation == "released")
    else:
        rows = b * c * (1 if bank is None else 2)
        name = resolve(backend, "dual", embeddings.device, BACKENDS, _sscl.size_of(embeddings, rows))
    return bank, prototypes, sample, prototype, weights, name


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
