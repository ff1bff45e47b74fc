"""The image-level multi-label contrastive losses as one function."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from .._collectives import Group
from .._groups import GroupLike
from ..ops import mlc as _mlc
from . import _arguments as arguments
from ._group import (
    check_backend,
    check_capacity,
    check_features,
    check_ring,
    over_group,
    reduce_part,
    rows_of_ranks,
    signature,
    together,
)
from ._reduce import REDUCTIONS, Weights

BACKENDS = _mlc.mlc.backends
WEIGHTINGS = _mlc.WEIGHTINGS
_OF_CLASSES = ("mulsupcon", "msc")


def multilabel_supcon_loss(
    features: Tensor,
    labels: Tensor | None,
    *,
    weighting: str = "mulsupcon",
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    threshold: float = 0.3,
    alpha: float = 1.0,
    beta: float = 1.0,
    per_image: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    include_batch: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    prototypes: Tensor | None = None,
    weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
    group: GroupLike = None,
    ring: bool = False,
    capacity: int | None = None,
) -> Tensor:
    r"""Supervised contrastive loss of images with several labels, in every published weighting of the pairs.

    Anchors are the rows ``i = (b, v)``; columns ``j`` are the other rows, the keys, and with ``"msc"`` the prototypes.
    With ``s_ij = z_i . z_j / temperature`` of unit vectors and ``b_j = 1`` (msc: ``beta`` for rows and keys):

        loss = sum_i a_i sum_j W_ij (log sum_k b_k exp(s_ik) - s_ij)

    =============  =====================================================================  =========================
    weighting      W_ij                                                                   source
    =============  =====================================================================  =========================
    ``all``        1 / count where the label sets are equal                               Zhang and Wu, AAAI 2024
    ``any``        1 / count where they share a class                                     the same
    ``mulsupcon``  sum over shared classes c of 1 / n_ic                                  MulSupCon, AAAI 2024
    ``jaccard``    J / count where J >= threshold                                         MultiSupCon, NeurIPS 2022 W.
    ``overlap``    J / sum of J                                                           arXiv 2412.00101
    ``simdis``     shared / own / (1 + what j has beside) / count where they share one    arXiv 2410.13439
    ``msc``        sum over shared classes c of alpha / union / m_ic; prototypes 1/m_ic   MSC, arXiv 2404.08720
    =============  =====================================================================  =========================

    The whole definition, with what is 0 when something is missing, is :func:`sadcl.reference.mlc.mlc`. A class that one
    of two images ignores (-1) plays no part between them. Nothing as large as anchors times columns is kept in memory.

    Args:
        features: ``[B, V, D]`` or ``[B, D]``; float32, bfloat16, float16 or float64; any strides.
        labels: ``[B, C]``, any real dtype: 1, 0 or -1 (ignored). ``None`` only with ``weights``.
        weighting: see the table; not used with ``weights``.
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        base_temperature: the loss is scaled by ``temperature / base_temperature``; ``None``: not.
        threshold: of ``"jaccard"``, in [0, 1].
        alpha, beta: of ``"msc"``, numbers >= 0.
        per_image: of ``"mulsupcon"``: every image counts the same, whatever number of labels it has.
        normalize: use ``x / |x|``; otherwise vectors as they are.
        reduction: ``"none"`` gives ``[B, V]`` (``[B]`` for 2-D features), ``"sum"`` adds it up, ``"mean"`` divides by
            the number of anchors (mulsupcon without ``per_image``: of their labels).
        include_batch: whether the rows are columns; without them ``keys`` must be given (MoCo).
        keys: ``[K, D]``, features' dtype; K may be 0. It receives a gradient if it asks for one.
        key_labels: ``[K, C]``, as ``labels``.
        prototypes: ``[C, D]``, for ``"msc"`` and only for it.
        weights: ``[B V, columns]`` >= 0: W itself, columns in the order rows (``b V + v``), keys. What a row gives to
            itself plays no part. It receives a gradient if it asks for one.
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the terms of a class (``"mulsupcon"``, ``"msc"``).
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the loss of an image's anchors.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        group, ring: the rows of all ranks of a process group are columns, as for :func:`sample_contrastive_loss`. Keys,
            their labels and prototypes are the same on all ranks; ``weights`` are ``[B V, rows of all ranks + K]``.
        capacity: with a group: the most images of a rank.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V]``, or ``[B]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, numbers or choices; arguments that do not go together.
        RuntimeError: a backend asked for by name cannot run.
    """
    flat = isinstance(features, Tensor) and features.dim() == 2

    def checked() -> _Checked:
        return _check(
            features, labels, keys, key_labels, prototypes, weights, class_weight, sample_weight, temperature,
            base_temperature, weighting, reduction, (threshold, alpha, beta), per_image, normalize, include_batch,
            backend, group, ring, capacity,
        )  # fmt: skip

    x = together(group, features, checked)
    over = over_group(group, x.features.shape[0])
    if over is not None:
        numbers = {"threshold": float(threshold), "alpha": float(alpha), "beta": float(beta)}
        same = {
            "weighting": weighting, **numbers, "normalize": normalize, "include_batch": include_batch,
            "per_image": per_image, "reduction": reduction, "base_temperature": base_temperature,
        }  # fmt: skip
        given = {"labels": labels, "key_labels": key_labels, "weights": weights}
        more = {**numbers, "normalize": normalize, "include_batch": include_batch}
        rows, size = _over_ranks(x, weighting, given, more, same, over, ring, capacity)
    elif x.backend == "reference":
        _check_values(labels, key_labels, weights)
        rows = reference.mlc(
            x.features, labels, x.tau, weighting, keys=x.keys, key_labels=key_labels, prototypes=x.prototypes,
            weights=weights, class_weight=x.weights.of_class, threshold=threshold, alpha=alpha, beta=beta,
            include_batch=include_batch, normalize=normalize,
        ).to(x.tau.dtype)  # fmt: skip
    else:
        code = WEIGHTINGS.index(weighting) if weights is None else _mlc.DENSE
        leaves = (x.features, x.keys, x.prototypes, weights, x.weights.of_class, x.tau)
        needs_grad = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        keep = _mlc.numbers_to_keep(x.features, x.keys, include_batch, needs_grad, x.backend)
        inputs = _mlc.Inputs(
            x.features, labels, x.keys, key_labels, x.prototypes, weights, x.weights.of_class, x.tau, code,
            float(threshold), float(alpha), float(beta), include_batch, normalize, keep,
        )  # fmt: skip
        rows = _mlc.mlc(inputs, x.backend).row_loss

    if x.scale is not None:
        rows = rows * x.scale
    if x.weights.of_sample is not None:
        rows = rows * x.weights.of_sample[:, None]
    used = weighting if weights is None else ""
    if over is None:
        return _reduce(rows, labels, used, per_image, reduction, flat)
    own, by_labels = _own_factor(rows, labels, used, per_image)
    own = own[:, 0] if flat and reduction == "none" else own
    return reduce_part(own, size[1 if by_labels else 0], reduction, over)


class _Checked(NamedTuple):
    """Arguments that may go together."""

    features: Tensor  # [B, V, D]
    keys: Tensor | None
    prototypes: Tensor | None
    tau: Tensor
    scale: Tensor | None
    weights: Weights
    backend: str


def _check(
    features: Tensor,
    labels: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    prototypes: Tensor | None,
    weights: Tensor | None,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    temperature: float | Tensor,
    base_temperature: float | None,
    weighting: str,
    reduction: str,
    numbers: tuple[float, float, float],
    per_image: bool,
    normalize: bool,
    include_batch: bool,
    backend: str | None,
    group: GroupLike,
    ring: bool,
    capacity: int | None,
) -> _Checked:
    check_features("features", features, (2, 3), "[B, V, D] or [B, D]", group)
    check_ring(ring, group)
    check_capacity(capacity, group)
    x = features[:, None] if features.dim() == 2 else features
    check.check_choice("reduction", reduction, REDUCTIONS)
    check.check_choice("weighting", weighting, WEIGHTINGS)
    check_multilabel_numbers(*numbers)
    _check_combination(weighting, labels, keys, key_labels, prototypes, weights, class_weight, include_batch, per_image)
    c = _check_labels(x, labels, keys, key_labels)
    keys, prototypes = _check_vectors(x, keys, prototypes, c)
    over = over_group(group, x.shape[0])
    if weights is not None:
        _check_dense(x, keys, weights, include_batch, over is not None)
    tau = check.as_temperature(temperature, x)
    scale = arguments.check_scale(tau, base_temperature, x)
    checked = arguments.check_weights(class_weight, sample_weight, x.shape[0], c, x)
    if over is not None:
        name = check_backend(backend, "mlc", x.device)
        _check_values(labels, key_labels, weights)
    else:
        name = resolve(backend, "mlc", x.device, BACKENDS, _mlc.size_of(x, keys, weighting, weights is not None))
    if normalize:
        x = arguments.in_range(x)
        keys = None if keys is None else arguments.in_range(keys)
        prototypes = None if prototypes is None else arguments.in_range(prototypes)
    return _Checked(x, keys, prototypes, tau, scale, checked, name)


def _check_values(labels: Tensor | None, key_labels: Tensor | None, weights: Tensor | None) -> None:
    """Refuse labels and weights of no meaning, where values are read."""
    for what, given in (("labels", labels), ("key_labels", key_labels)):
        if given is not None and check.reads_values(given) and check.holds_values(given):
            check.check_label_values(given, what)
    if weights is not None and check.holds_values(weights):
        check.check_weight_values("weights", weights)


def _over_ranks(
    x: _Checked,
    weighting: str,
    given: dict[str, Tensor | None],
    more: dict[str, Any],
    same: dict[str, Any],
    group: Group,
    ring: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """Losses of own rows ``[B, V]``, and how many rows and labels all ranks have."""
    b, v, _ = x.features.shape
    labels = given["labels"]
    same = {
        "V": v, "C": "none" if labels is None else labels.shape[1], "weights": given["weights"] is not None,
        "K": "none" if x.keys is None else x.keys.shape[0], **same, "ring": ring, "capacity": capacity,
    }  # fmt: skip
    code = WEIGHTINGS.index(weighting) if given["weights"] is None else _mlc.DENSE
    out = rows_of_ranks(
        x.features[:, :, None], x.tau, code, signature("multilabel_supcon_loss", x.features, **same), group,
        x.backend, keys=x.keys, prototypes=x.prototypes, class_weight=x.weights.of_class, ring=ring,
        capacity=capacity, **given, **more,
    )  # fmt: skip
    return out.row_loss[:, :, 0], out.size


def _reduce(rows: Tensor, labels: Tensor | None, weighting: str, per_image: bool, reduction: str, flat: bool) -> Tensor:
    """``a_i`` and the reduction of ``rows [B, V]``."""
    rows, by_labels = _own_factor(rows, labels, weighting, per_image)
    if reduction == "none":
        return rows[:, 0] if flat else rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if by_labels:
        assert labels is not None
        # sum() of truth values copies them to int64 first: 8 bytes a label.
        return total / (torch.count_nonzero(labels == 1) * rows.shape[1]).clamp(min=1)
    return total / rows.numel()


def _own_factor(rows: Tensor, labels: Tensor | None, weighting: str, per_image: bool) -> tuple[Tensor, bool]:
    """``rows [B, V]`` times what ``a_i`` says of the image alone, and whether the mean is over labels, not rows."""
    if weighting not in _OF_CLASSES:
        return rows, False
    assert labels is not None
    if weighting == "msc" or per_image:
        return rows / (labels == 1).sum(dim=1, dtype=torch.int32).clamp(min=1).to(rows.dtype)[:, None], False
    return rows, True


def check_multilabel_numbers(threshold: float, alpha: float, beta: float) -> None:
    """Refuse constants that no weighting can have."""
    for name, value in (("threshold", threshold), ("alpha", alpha), ("beta", beta)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _check_combination(
    weighting: str,
    labels: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    prototypes: Tensor | None,
    weights: Tensor | None,
    class_weight: Tensor | None,
    include_batch: bool,
    per_image: bool,
) -> None:
    """Refuse what does not go together."""
    used = "weights=" if weights is not None else f"weighting={weighting!r}"
    if labels is None and weights is None:
        raise TypeError("labels: expected a torch.Tensor [B, C], got NoneType (only with weights= may it be None)")
    if key_labels is not None and keys is None:
        raise ValueError("key_labels: expected None without keys, got a tensor")
    if keys is not None and key_labels is None and weights is None:
        raise ValueError("key_labels: expected the labels [K, C] of keys, got None")
    if key_labels is not None and labels is None:
        raise ValueError("key_labels: expected None without labels, got a tensor")
    if not include_batch and keys is None:
        raise ValueError("include_batch: expected True without keys (there would be no columns), got False")
    if prototypes is None and weighting == "msc" and weights is None:
        raise ValueError("prototypes: expected a tensor [C, D] with weighting='msc', got None")
    if prototypes is not None and (weighting != "msc" or weights is not None):
        raise ValueError(f"prototypes: expected None (they belong to weighting='msc'), got a tensor with {used}")
    if class_weight is not None and (weighting not in _OF_CLASSES or weights is not None):
        raise ValueError(f"class_weight: expected None (it belongs to mulsupcon and msc), got a tensor with {used}")
    if per_image and (weighting != "mulsupcon" or weights is not None):
        raise ValueError(f"per_image: expected False (it belongs to weighting='mulsupcon'), got True with {used}")


def _check_labels(x: Tensor, labels: Tensor | None, keys: Tensor | None, key_labels: Tensor | None) -> int | None:
    """The number of classes, None without labels."""
    if labels is None:
        return None
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_real("labels", labels)
    arguments.check_labels(labels, x.shape[0], labels.shape[1], x)
    if 0 in labels.shape[1:] or x.shape[0] > 0:
        check.check_nonempty("labels", labels)
    if keys is not None and key_labels is not None:
        check.check_tensor("keys", keys, (2,), "[K, D]")
        check.check_tensor("key_labels", key_labels, (2,), "[K, C]")
        check.check_real("key_labels", key_labels)
        check.check_size("key_labels", key_labels, 0, keys.shape[0], "K", "keys")
        check.check_size("key_labels", key_labels, 1, labels.shape[1], "C", "labels")
        check.check_same_device("key_labels", key_labels, "features", x)
    return labels.shape[1]


def _check_vectors(
    x: Tensor, keys: Tensor | None, prototypes: Tensor | None, c: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Keys and prototypes in features' dtype."""
    if keys is not None:
        check.check_tensor("keys", keys, (2,), "[K, D]")
        check.check_size("keys", keys, 1, x.shape[2], "D", "features")
        keys = arguments.as_features("keys", keys, x)
    if prototypes is not None:
        assert c is not None
        check.check_tensor("prototypes", prototypes, (2,), "[C, D]")
        check.check_size("prototypes", prototypes, 0, c, "C", "labels")
        check.check_size("prototypes", prototypes, 1, x.shape[2], "D", "features")
        prototypes = arguments.as_features("prototypes", prototypes, x)
    return keys, prototypes


def _check_dense(x: Tensor, keys: Tensor | None, weights: Tensor, include_batch: bool, over: bool) -> None:
    n = x.shape[0] * x.shape[1]
    columns = n * include_batch + (0 if keys is None else keys.shape[0])
    check.check_tensor("weights", weights, (2,), "[B V, columns]")
    check.check_floating("weights", weights)
    check.check_size("weights", weights, 0, n, "B V", "features")
    if not over:  # how many rows the other ranks have is not known yet
        check.check_size("weights", weights, 1, columns, "columns", "features and keys")
    check.check_same_device("weights", weights, "features", x)
