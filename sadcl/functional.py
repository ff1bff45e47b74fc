"""The losses as functions: validate, compact, op, reduce.

Weights multiply the elements that ``reduction="none"`` returns; the divisor of ``reduction="mean"`` stays the count
(``|I|``, ``sum(y)``), as in ``torch.nn.BCEWithLogitsLoss``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _checks as check
from . import reference
from ._backends import resolve
from .ops import asl as _asl
from .ops import compact as _compact
from .ops import pscl as _pscl
from .ops import sscl as _sscl
from .ops.compact import Active
from .ops.label_attention import label_attention

__all__ = [
    "Active",
    "ContrastiveStats",
    "asymmetric_loss",
    "compact_labels",
    "contrastive_stats",
    "label_attention",
    "prototype_contrastive_loss",
    "sample_contrastive_loss",
    "supcon_loss",
]

FORMULATIONS = ("paper", "released")
_REDUCTIONS = ("mean", "sum", "none")


class ContrastiveStats(NamedTuple):
    """What a contrastive loss worked on, as 0-d tensors (nothing is read back from the device).

    Attributes:
        anchors: anchors with at least one positive.
        positives: (anchor, positive) pairs.
    """

    anchors: Tensor
    positives: Tensor


def compact_labels(labels: Tensor, backend: str | None = None) -> Active:
    """Compact labels once for several losses; pass the result as their ``active=``.

    Args:
        labels: ``[B, C]`` of any real dtype; 1 active, 0 not, -1 ignored.
        backend: ``None``, ``"cpp"``, ``"triton"`` or ``"torch"``.

    Returns:
        :class:`sadcl.ops.compact.Active`, whose docstring has a worked example.

    Raises:
        ValueError: if the rank is not 2, a dimension is empty, or (on a CPU, or with ``SADCL_CHECK=1``) a value is
            something else.
        TypeError: if ``labels`` is not a tensor or is complex.
    """
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_nonempty("labels", labels)
    if labels.is_complex():
        raise TypeError(f"labels: expected a real dtype, got {labels.dtype}")
    name = resolve(backend, "compact", labels.device, _compact.IMPLEMENTED)
    return _compact.compact(labels, "torch" if name == "reference" else name)


def contrastive_stats(labels: Tensor, views: int = 1, *, active: Active | None = None) -> ContrastiveStats:
    """Count the anchors and positives that SSCL finds in ``labels [B, C]`` with ``views`` views of every image.

    A loss of 0 because nothing could be contrasted is thereby told from a perfect one.
    """
    rows = _check_active(active, labels, None).class_ptr.diff().long() * views
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
    check.check_choice("reduction", reduction, _REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    released = formulation == "released"
    name = resolve(backend, "sscl", features.device, _sscl.IMPLEMENTED)
    active = _check_active(active, labels, backend)

    if name == "reference":
        rows = reference.sscl(features, active.target, tau, released).to(tau.dtype)
    else:
        rows = _sscl.sscl(features, active.pairs, active.class_ptr, tau, name, released=released)

    if released:
        rows = rows * _released_anchors(active.target, v)
        if base_temperature is not None:
            rows = rows * (tau / check.as_temperature(base_temperature, features, "base_temperature"))
    rows = arguments.weighted(rows, class_weight, sample_weight)
    return _reduce(rows, active.class_ptr[-1] * v, reduction)


def _released_anchors(target: Tensor, v: int) -> Tensor:
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
    check.check_choice("reduction", reduction, _REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    released = formulation == "released"
    name = resolve(backend, "pscl", features.device, _pscl.IMPLEMENTED)
    active = _check_active(active, labels, backend)

    if name == "reference":
        classes = reference.pscl(features, prototypes, active.target, tau, released).to(tau.dtype)
    else:
        classes = _pscl.pscl(features, prototypes, active.target, tau, name, released=released)

    count = active.class_ptr[-1]
    if released:
        classes = classes * (count > 0)  # the released code crashes without any positive; here the loss is 0
    if reduction != "none" and sample_weight is None:
        return _reduce(arguments.weighted(classes, class_weight, None), count, reduction)
    positives = active.class_ptr.diff()
    share = (active.target == 1) / positives.clamp(min=1)
    shares = arguments.weighted(classes * share, class_weight, sample_weight)
    if reduction == "none":
        return shares
    absent = torch.where(positives == 0, arguments.weighted(classes, class_weight, None), 0.0)
    return _reduce(torch.cat([shares.flatten(), absent]), count, reduction)


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
        class_weight: ``[C]``, multiplies the elements of a class.
        sample_weight: ``[B]``, multiplies the elements of an image.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

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
    check.check_choice("reduction", reduction, (*_REDUCTIONS, "released"))
    focus = arguments.check_focus(_asl.Focus(gamma_neg, gamma_pos, clip, eps, detach_focal_weight))
    name = resolve(backend, "asl", logits.device, _asl.IMPLEMENTED)

    by_image = reduction != "none"
    if name == "reference":
        loss = reference.asl(logits, labels, gamma_neg, gamma_pos, clip, eps, detach_focal_weight)
        loss = arguments.weighted(loss.to(check.accumulation_dtype(logits.dtype)), class_weight, None)
        loss = loss.sum(dim=1) if by_image else loss
    else:
        weight = None if class_weight is None else arguments.class_scale(class_weight, c, logits)
        loss = _asl.asl(logits, labels, weight, focus, by_image, name)
    if sample_weight is not None:
        weight = arguments.sample_scale(sample_weight, b, loss)
        loss = loss * (weight if by_image else weight[:, None])
    if reduction == "none":
        return loss
    if reduction == "released":
        return loss.sum() / b / c * 1000.0
    return _reduce(loss, (labels != -1).sum(), reduction)


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float | None = 0.07,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Single-label supervised contrastive loss (SupCon), and SimCLR's loss without labels.

        loss = temperature / base_temperature * mean_i [ log sum_{a != i} exp(s_ia) - mean_{p in P(i)} s_ip ]

    Features are used as they are: normalise them first. An anchor without a positive adds 0 and counts in the mean.

    Source: Supervised Contrastive Learning (NeurIPS 2020), eq. 2.

    Args:
        features: ``[B, V, D]``, or ``[B, V, ...]``, which is flattened.
        labels: ``[B]`` class of each image; positives are the other rows with the same class.
        mask: ``[B, B]`` weights >= 0, ``mask[i, j] > 0``: image j is a positive of image i; may be asymmetric. Runs as
            dense torch operators (``B V`` squared memory) whatever the device. Not together with ``labels``.
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first view only.
        base_temperature: see above; ``None`` means no factor.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, V]``, or ``[B, 1]`` for ``"one"``).
        sample_weight: ``[B]``, multiplies the loss of an image's anchors.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, temperature or choices; both ``labels`` and ``mask``.
        RuntimeError: a backend asked for by name cannot run.
    """
    if isinstance(features, Tensor) and features.dim() > 3:
        features = features.flatten(2)
    check.check_tensor("features", features, (3,), "[B, V, D] or [B, V, ...]")
    check.check_floating("features", features)
    check.check_nonempty("features", features)
    check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check.check_choice("reduction", reduction, _REDUCTIONS)
    if labels is not None and mask is not None:
        raise ValueError("labels and mask: expected at most one of them, got both")
    b, v, _ = features.shape
    tau = check.as_temperature(temperature, features)

    if mask is not None:
        arguments.check_mask(mask, b, features)
        name = resolve(backend, "supcon with a mask", features.device, ("torch",))
        with torch.autocast(features.device.type, enabled=False):
            run = reference.supcon if name == "reference" else _masked_supcon
            rows = run(features, mask, tau)
    else:
        group = arguments.check_groups(labels, b, features)
        name = resolve(backend, "supcon", features.device, _sscl.IMPLEMENTED)
        if name == "reference":
            rows = reference.supcon(features, group[:, None] == group[None, :], tau)
        else:
            pairs, group_ptr = _group_rows(group)
            rows = _sscl.sscl(features[:, :, None], pairs, group_ptr, tau, name, normalize=False)[:, :, 0]
    rows = rows.to(tau.dtype)
    if contrast_mode == "one":
        rows = rows[:, :1]
    if base_temperature is not None:
        rows = rows * (tau / check.as_temperature(base_temperature, features, "base_temperature"))
    if sample_weight is not None:
        rows = rows * arguments.sample_scale(sample_weight, b, rows)[:, None]
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def _group_rows(group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by group and the pointers of up to ``B`` groups, without a shape that depends on the data."""
    b = group.shape[0]
    ordered, rows = torch.sort(group, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    rank = is_first.cumsum(0) - 1
    pointers = torch.searchsorted(rank, torch.arange(b + 1, device=group.device))
    return rows.int(), pointers.int()


def _masked_supcon(features: Tensor, mask: Tensor, tau: Tensor) -> Tensor:
    b, v, d = features.shape
    x = features.reshape(b * v, d).to(tau.dtype)
    is_self = torch.eye(b * v, dtype=torch.bool, device=x.device)
    s = x @ x.t() / tau
    weight = mask.to(x.dtype).repeat_interleave(v, 0).repeat_interleave(v, 1).masked_fill(is_self, 0.0)
    total = weight.sum(dim=1)
    normaliser = torch.logsumexp(s.masked_fill(is_self, float("-inf")), dim=1)
    loss = normaliser - (weight * s).sum(dim=1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, loss, 0.0).reshape(b, v)


def _reduce(values: Tensor, count: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    total = values.sum()
    return total / count.clamp(min=1) if reduction == "mean" else total


def _check_active(active: Active | None, labels: Tensor, backend: str | None) -> Active:
    if active is None:
        return compact_labels(labels, backend)
    if not isinstance(active, Active):
        raise TypeError(f"active: expected the result of compact_labels, got {type(active).__name__}")
    if active.target.shape != labels.shape:
        raise ValueError(f"active: expected it from labels {tuple(labels.shape)}, got {tuple(active.target.shape)}")
    return active
