"""The contrastive losses as functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from ..ops import compact as _compact
from ..ops import pscl as _pscl
from ..ops import sscl as _sscl
from ..ops.compact import Active
from . import _arguments as arguments
from ._reduce import REDUCTIONS, reduce

FORMULATIONS = ("paper", "released")


class ContrastiveStats(NamedTuple):
    """What a contrastive loss worked on, as 0-d tensors (nothing is read back from the device).

    Attributes:
        anchors: anchors with at least one positive.
        positives: (anchor, positive) pairs.
    """

    anchors: Tensor
    positives: Tensor


def compact_labels(labels: Tensor, backend: str | None = None, *, capacity: int | None = None) -> Active:
    """Compact labels once for several losses; pass the result as their ``active=``.

    Args:
        labels: ``[B, C]`` of any real dtype; 1 active, 0 not, -1 ignored.
        backend: ``None``, ``"cpp"``, ``"triton"`` or ``"torch"``.
        capacity: the most active pairs there can be; the losses' buffers follow it. Default: ``B * C``.

    Returns:
        :class:`sadcl.ops.compact.Active`, whose docstring has a worked example.

    Raises:
        ValueError: if the rank is not 2, a dimension is empty, or (on a CPU, or with ``SADCL_CHECK=1``) a value is
            something else, or there are more active pairs than ``capacity``. (On a GPU without the check the losses
            become NaN then, and :attr:`Active.overflowed` is true.)
        TypeError: if ``labels`` is not a tensor or is complex.
    """
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_nonempty("labels", labels)
    if labels.is_complex():
        raise TypeError(f"labels: expected a real dtype, got {labels.dtype}")
    name = resolve(backend, "compact", labels.device, _compact.IMPLEMENTED)
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity: expected None or an integer > 0, got {capacity!r}")
    return _compact.compact(labels, capacity, "torch" if name == "reference" else name)


def contrastive_stats(labels: Tensor, views: int = 1, *, active: Active | None = None) -> ContrastiveStats:
    """Count the anchors and positives that SSCL finds in ``labels [B, C]`` with ``views`` views of every image.

    A loss of 0 because nothing could be contrasted is thereby told from a perfect one.
    """
    rows = check_active(active, labels, None).class_ptr.diff().long() * views
    return ContrastiveStats(torch.where(rows > 1, rows, 0).sum(), (rows * (rows - 1).clamp(min=0)).sum())


def sample_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    base_temperature: float | None = None,
    formulation: str = "paper",
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    active: Active | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Sample-to-sample contrastive loss (SSCL) between label embeddings.

    Rows ``(b, v, c)`` with ``labels[b, c] = 1`` attract the other rows of their class and repel all other rows, by
    cosine over ``temperature``:

        loss = 1/|I| * sum_{i: P(i) not empty} -1/|P(i)| * sum_{p in P(i)} log( e^{s_ip} / sum_{a in A(i)} e^{s_ia} )

    An anchor without a positive adds 0 and counts in ``|I|``; without any active row the loss is 0, connected to the
    graph. A zero vector has cosine 0 and gradient 0; NaN in an active row gives NaN.

    Source: SADCL (ECAI 2023), L_SSCL. ``formulation="released"`` gives the numbers of the authors' code
    (docs/faithfulness.md).

    Args:
        features: ``[B, V, C, D]`` or ``[B, C, D]``; float32, bfloat16, float16 or float64; any strides; not normalised.
        labels: ``[B, C]``, any real dtype: 1 active, 0 not, -1 ignored (the pair takes no part).
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        base_temperature: the released loss is scaled by ``temperature / base_temperature``; ``None`` means 1.
            The paper's has no such factor.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"`` divides by the number of active rows, ``"sum"`` by nothing (released: its own factor
            without ``1 / (V sum(labels))``), ``"none"`` gives ``[B, V, C]``, 0 where inactive.
        class_weight: ``[C]``, multiplies the loss of a class's anchors.
        sample_weight: ``[B]``, multiplies the loss of an image's anchors.
        active: :func:`compact_labels` of these labels, to compact once for several losses.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V, C]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperature or choices.
        RuntimeError: a backend asked for by name cannot run.
    """
    check.check_tensor("features", features, (3, 4), "[B, V, C, D] or [B, C, D]")
    check.check_floating("features", features)
    check.check_nonempty("features", features)
    if features.dim() == 3:
        features = features.unsqueeze(1)
    b, v, c, _ = features.shape
    arguments.check_labels(labels, b, c, features)
    check.check_choice("formulation", formulation, FORMULATIONS)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    released = formulation == "released"
    name = resolve(backend, "sscl", features.device, _sscl.IMPLEMENTED)
    active = check_active(active, labels, backend)

    if name == "reference":
        rows = reference.sscl(features, active.target, tau, released).to(tau.dtype)
    else:
        rows = _sscl.sscl(features, active.pairs, active.class_ptr, tau, name, released=released)

    if released:
        rows = rows * released_anchors(active.target, v)
        if base_temperature is not None:
            rows = rows * (tau / check.as_temperature(base_temperature, features, "base_temperature"))
    rows = arguments.weighted(rows, class_weight, sample_weight)
    return reduce(rows, active.class_ptr[-1] * v, reduction)


def released_anchors(target: Tensor, v: int) -> Tensor:
    """The released anchor test ``[B, V, C]``: row (b, v, c) is an anchor iff image ``(v B + b) // V`` has class c."""
    b = target.shape[0]
    view = torch.arange(v, device=target.device)
    image = torch.arange(b, device=target.device)
    return target[(view * b + image[:, None]) // v] == 1


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
    b, c, d = features.shape
    prototypes = arguments.check_prototypes(prototypes, features)
    arguments.check_labels(labels, b, c, features)
    check.check_choice("formulation", formulation, FORMULATIONS)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    released = formulation == "released"
    name = resolve(backend, "pscl", features.device, _pscl.IMPLEMENTED)
    active = check_active(active, labels, backend)

    if name == "reference":
        classes = reference.pscl(features, prototypes, active.target, tau, released).to(tau.dtype)
    else:
        classes = _pscl.pscl(features, prototypes, active.target, tau, name, released=released)

    count = active.class_ptr[-1]
    if released:
        classes = classes * (count > 0)  # the released code crashes without any positive; here the loss is 0
    if reduction != "none" and sample_weight is None:
        return reduce(arguments.weighted(classes, class_weight, None), count, reduction)
    positives = active.class_ptr.diff()
    share = (active.target == 1) / positives.clamp(min=1)
    shares = arguments.weighted(classes * share, class_weight, sample_weight)
    if reduction == "none":
        return shares
    absent = torch.where(positives == 0, arguments.weighted(classes, class_weight, None), 0.0)
    return reduce(torch.cat([shares.flatten(), absent]), count, reduction)


def check_active(active: Active | None, labels: Tensor, backend: str | None) -> Active:
    if active is None:
        return compact_labels(labels, backend)
    if not isinstance(active, Active):
        raise TypeError(f"active: expected the result of compact_labels, got {type(active).__name__}")
    if active.target.shape != labels.shape:
        raise ValueError(f"active: expected it from labels {tuple(labels.shape)}, got {tuple(active.target.shape)}")
    return active
