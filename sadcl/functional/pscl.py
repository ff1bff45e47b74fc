"""The prototype-to-sample contrastive loss as a function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from .._checks import reads_values
from .._collectives import Group
from .._groups import GroupLike
from ..ops import group_pscl as _over
from ..ops import pscl as _pscl
from ..ops.compact import Active
from . import _arguments as arguments
from ._arguments import FORMULATIONS
from ._group import check_features, features_of_all, over_group, reduce_part, signature, together
from ._reduce import REDUCTIONS, Weights, reduce
from .compact import check_active

BACKENDS = _pscl.pscl.backends


def prototype_contrastive_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    formulation: str = "paper",
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    active: Active | None = None,
    backend: str | None = None,
    group: GroupLike = None,
) -> Tensor:
    r"""Prototype-to-sample contrastive loss (PSCL) between label embeddings and category prototypes.

    With ``s_bc = cos(x_bc, p_c) / temperature`` over all images that are not ignored, positive or not:

        loss = -1/sum(y) * sum_{c with a positive} ( logsumexp_{b: y_bc = 1} s_bc  -  logsumexp_b s_bc )

    Without any positive the loss is 0, connected to the graph. A zero vector has cosine 0 and gradient 0; NaN in any
    row that is not ignored gives NaN.

    Source: SADCL (ECAI 2023), L_PSCL. ``formulation="released"`` adds the authors' term for classes without a positive
    (docs/faithfulness.md).

    Args:
        features: ``[B, C, D]``; float32, bfloat16, float16 or float64; any strides; not normalised.
        prototypes: ``[C, D]`` or ``[1, C, D]``, same dtype.
        labels: ``[B, C]``, any real dtype: 1 positive, 0 negative, -1 ignored (the pair takes no part).
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"`` divides by the number of positives, ``"sum"`` does not, ``"none"`` gives ``[B, C]``: a
            class's loss in equal shares on its positives, 0 elsewhere (so the released term of a class without a
            positive is in ``"mean"`` and ``"sum"`` only).
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a class.
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the shares of an image's positives.
        active: :func:`compact_labels` of these labels.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.
        group: over the images of all ranks of ``"world"``, a ProcessGroup, or a DeviceMesh of one dimension, as for
            :func:`sample_contrastive_loss`. The prototypes are the same on all ranks.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, C]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperature or choices; ranks of the group that disagree
            in them (on every rank alike).
        RuntimeError: a backend asked for by name cannot run.
    """

    def checked() -> Checked:
        return _check(
            features, prototypes, labels, temperature, formulation, reduction, class_weight, sample_weight, active,
            backend, group,
        )  # fmt: skip

    x = together(group, features, checked)
    released = formulation == "released"
    over = over_group(group, x.features.shape[0])
    if over is not None:
        return over_ranks(x, over, released, reduction)
    if x.backend == "reference":
        classes = reference.pscl(x.features, x.prototypes, x.active.target, x.tau, released).to(x.tau.dtype)
    elif reduction == "mean" and not released and not x.weights.given and x.backend in _pscl.pscl_mean.backends:
        active = x.active
        mean = _pscl.MeanInputs(x.features, x.prototypes, active.target, active.class_ptr, x.tau)
        return _pscl.pscl_mean(mean, x.backend).mean
    else:
        inputs = _pscl.Inputs(x.features, x.prototypes, x.active.target, x.tau, released)
        classes = _pscl.pscl(inputs, x.backend).class_loss
    return finish(classes, x.active, released, x.weights, reduction)


class Checked(NamedTuple):
    """Arguments that may go together."""

    features: Tensor
    prototypes: Tensor  # [C, D]
    tau: Tensor
    weights: Weights
    active: Active
    backend: str


def _check(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    formulation: str,
    reduction: str,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    active: Active | None,
    backend: str | None,
    group: GroupLike,
) -> Checked:
    check_features("features", features, (3,), "[B, C, D]", group)
    b, c, d = features.shape
    prototypes = arguments.check_prototypes(prototypes, features)
    arguments.check_labels(labels, b, c, features)
    check.check_choice("formulation", formulation, FORMULATIONS)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    weights = arguments.check_weights(class_weight, sample_weight, b, c, features)
    name = resolve(backend, "pscl", features.device, BACKENDS, (b, c, d))
    active = check_active(active, labels, name)
    if group is not None and name == "reference":
        raise ValueError("backend: expected a backend that computes over a group, got 'reference'")
    return Checked(arguments.in_range(features), arguments.in_range(prototypes), tau, weights, active, name)


def over_ranks(x: Checked, group: Group, released: bool, reduction: str, after: Tensor | None = None) -> Tensor:
    """Own positives' shares of their classes' losses; classes without a positive are shared by all ranks.

    ``after`` is a loss over the group in the same graph. A compiler orders what does not depend on each other by size,
    which differs between ranks.
    """
    c = x.features.shape[1]
    same = signature("prototype_contrastive_loss", x.features, C=c, released=released, reduction=reduction)
    inputs = _over.Inputs(
        features_of_all(x.features), x.prototypes, x.active.target, x.tau, after, released, reads_values(x.features),
        same, group.name, group.rank, group.world,
    )  # fmt: skip
    out = _over.group_pscl(inputs, x.backend)
    total = out.positives.sum()
    classes = out.class_loss * (total > 0) if released else out.class_loss
    share = (x.active.target == 1).to(classes.dtype) / out.positives.clamp(min=1)
    rows = x.weights.apply(classes * share)
    if reduction == "none":
        return rows
    absent = torch.where(out.positives == 0, x.weights.by_class(classes), 0.0) / group.world
    return reduce_part(torch.cat([rows.flatten(), absent]), total, reduction, group)


def finish(classes: Tensor, active: Active, released: bool, weights: Weights, reduction: str) -> Tensor:
    """What follows the op: a batch without positives, weights, shares of images, reduction of ``classes [C]``."""
    count = active.class_ptr[-1]
    if released:
        classes = classes * (count > 0)  # the released code crashes without any positive; here the loss is 0
    if reduction != "none" and weights.of_sample is None:
        return reduce(weights.by_class(classes), count, reduction)
    positives = active.class_ptr.diff()
    share = (active.target == 1).to(classes.dtype) / positives.clamp(min=1)
    shares = weights.apply(classes * share)
    if reduction == "none":
        return shares
    absent = torch.where(positives == 0, weights.by_class(classes), 0.0)
    return reduce(torch.cat([shares.flatten(), absent]), count, reduction)
