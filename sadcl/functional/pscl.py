"""The prototype-to-sample contrastive loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from ..ops import pscl as _pscl
from ..ops.compact import Active
from . import _arguments as arguments
from ._arguments import FORMULATIONS
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
        class_weight: ``[C]``, multiplies the loss of a class.
        sample_weight: ``[B]``, multiplies the shares of an image's positives.
        active: :func:`compact_labels` of these labels.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, C]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperature or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check.check_tensor("features", features, (3,), "[B, C, D]")
    check.check_floating("features", features)
    check.check_nonempty("features", features)
    b, c, _ = features.shape
    prototypes = arguments.check_prototypes(prototypes, features)
    arguments.check_labels(labels, b, c, features)
    check.check_choice("formulation", formulation, FORMULATIONS)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    weights = arguments.check_weights(class_weight, sample_weight, b, c, features)
    name = resolve(backend, "pscl", features.device, BACKENDS)
    active = check_active(active, labels, name)
    features, prototypes = arguments.in_range(features), arguments.in_range(prototypes)
    released = formulation == "released"

    if name == "reference":
        classes = reference.pscl(features, prototypes, active.target, tau, released).to(tau.dtype)
    else:
        classes = _pscl.pscl(_pscl.Inputs(features, prototypes, active.target, tau, released), name).class_loss
    return finish(classes, active, released, weights, reduction)


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
