"""The single-label supervised contrastive loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import by_name, resolve
from .._collectives import Group
from .._groups import GroupLike
from ..ops import group_rows as _rows
from ..ops import mlc as _mlc
from ..ops import sscl as _sscl
from ..ops._transforms import watched
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

BACKENDS = _sscl.sscl.backends


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
    group: GroupLike = None,
    ring: bool = False,
    capacity: int | None = None,
) -> Tensor:
    r"""Single-label supervised contrastive loss (SupCon), and SimCLR's loss without labels.

        loss = temperature / base_temperature * mean_i [ log sum_{a != i} exp(s_ia) - mean_{p in P(i)} s_ip ]

    Features are used as they are: normalise them first. An anchor without a positive adds 0 and counts in the mean.

    Source: Supervised Contrastive Learning (NeurIPS 2020), eq. 2.

    Args:
        features: ``[B, V, D]``, or ``[B, V, ...]``, which is flattened.
        labels: ``[B]`` class of each image; positives are the other rows with the same class.
        mask: ``[B, B]`` weights >= 0, ``mask[i, j] > 0``: image j is a positive of image i; may be asymmetric. It may
            ask for a gradient. Not together with ``labels``. Several views copy it to ``[B V, B V]``.
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first view only.
        base_temperature: see above; ``None`` means no factor.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, V]``, or ``[B, 1]`` for ``"one"``).
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the loss of an image's anchors.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.
            Of bfloat16 as :func:`sample_contrastive_loss`.
        group, ring: over the ranks of a process group, as for :func:`sample_contrastive_loss`. Labels mean the same on
            all ranks; ``mask`` is ``[B, images of all ranks]`` then, in rank order.
        capacity: with a group: the most images of a rank.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, temperature, choices or weights; both ``labels`` and ``mask``.
        RuntimeError: a backend asked for by name cannot run.
    """
    if isinstance(features, Tensor) and features.dim() > 3:
        features = features.flatten(2)

    def checked() -> tuple[Tensor, Tensor | None, Weights]:
        return _check(
            features, labels, mask, temperature, contrast_mode, base_temperature, reduction, sample_weight, backend,
            group, ring, capacity,
        )  # fmt: skip

    tau, scale, weights = together(group, features, checked)
    b, v, _ = features.shape
    over = over_group(group, b)
    count: Tensor | None = None
    if over is not None:
        same = signature(
            "supcon_loss", features, V=v, labels=_kind(labels), mask=mask is not None, contrast_mode=contrast_mode,
            base_temperature=base_temperature, reduction=reduction, ring=ring, capacity=capacity,
        )  # fmt: skip
        name = check_backend(backend, "supcon", features.device)
        rows, count = _over_ranks(features, labels, mask, tau, same, over, name, ring, capacity)
    elif mask is not None:
        if not watched(mask):  # there the op speaks of weights
            check.check_weight_values("mask", mask)
        name = resolve(backend, "supcon with a mask", features.device, _mlc.mlc.backends)
        rows = reference.supcon(features, mask, tau) if name == "reference" else _masked(features, mask, tau, name)
    else:
        group = arguments.check_groups(labels, b, features)
        name = resolve(backend, "supcon", features.device, BACKENDS, _sscl.size_of(features, b * v))
        if name == "reference":
            rows = reference.supcon(features, group[:, None] == group[None, :], tau)
        else:
            pairs, group_ptr = _group_rows(group)
            views = features[:, :, None]
            keep = _sscl.scores_to_keep(views, pairs, group_ptr, tau, name)
            rounded = features.dtype == torch.bfloat16 and not by_name(backend)
            x = _sscl.Inputs(views, pairs, group_ptr, tau, normalize=False, released=False, keep=keep, rounded=rounded)
            rows = _sscl.sscl(x, name).row_loss[:, :, 0]
    rows = rows.to(tau.dtype)
    if contrast_mode == "one":
        rows = rows[:, :1]
    if scale is not None:
        rows = rows * scale
    rows = weights.apply(rows)
    if over is not None:
        assert count is not None
        return reduce_part(rows, count if contrast_mode == "all" else count // v, reduction, over)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def _check(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    contrast_mode: str,
    base_temperature: float | None,
    reduction: str,
    sample_weight: Tensor | None,
    backend: str | None,
    group: GroupLike,
    ring: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor | None, Weights]:
    """Temperature, scale and weights; refuses what does not go together."""
    check_features("features", features, (3,), "[B, V, D] or [B, V, ...]", group)
    check_ring(ring, group)
    check_capacity(capacity, group)
    check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check.check_choice("reduction", reduction, REDUCTIONS)
    if labels is not None and mask is not None:
        raise ValueError("labels and mask: expected at most one of them, got both")
    b = features.shape[0]
    over = over_group(group, b)
    if over is not None:
        check_backend(backend, "supcon", features.device)
    if mask is not None and over is not None:
        check.check_tensor("mask", mask, (2,), "[B, images of all ranks]")
        check.check_real("mask", mask)
        check.check_size("mask", mask, 0, b, "B", "features")
        check.check_same_device("mask", mask, "features", features)
    elif mask is not None:
        arguments.check_mask(mask, b, features)
    else:
        arguments.check_groups(labels, b, features)
    tau = check.as_temperature(temperature, features)
    scale = arguments.check_scale(tau, base_temperature, features)
    return tau, scale, arguments.check_weights(None, sample_weight, b, None, features)


def _kind(labels: Tensor | None) -> str:
    return "none" if labels is None else "floating" if labels.is_floating_point() else "integers"


def _over_ranks(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    tau: Tensor,
    same: str,
    group: Group,
    backend: str,
    ring: bool,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """Losses of own rows ``[B, V]``, and how many rows all ranks have."""
    b, v, _ = features.shape
    ids = weights = None
    if mask is not None:
        weights = mask.to(tau.dtype).repeat_interleave(v, 0).repeat_interleave(v, 1)
    elif labels is None:
        ids = torch.arange(b, device=features.device) + (group.rank << 32)
    else:
        ids = arguments.check_groups(labels, b, features)
        # Equal numbers have equal bits, but for the two zeros.
        ids = (ids.double() + 0.0).view(torch.int64) if ids.is_floating_point() else ids.long()
    out = rows_of_ranks(
        features[:, :, None], tau, _rows.MASK if mask is not None else _rows.IDS, same, group, backend, ids=ids,
        weights=weights, normalize=False, ring=ring, capacity=capacity,
    )  # fmt: skip
    return out.row_loss[:, :, 0], out.size[0]


def _group_rows(group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by group and the pointers of up to ``B`` groups, without a shape that depends on the data."""
    b = group.shape[0]
    ordered, rows = torch.sort(group, stable=True)
    is_first = (ordered != ordered.roll(1)) | (torch.arange(b, device=group.device) == 0)
    rank = is_first.cumsum(0) - 1
    pointers = torch.searchsorted(rank, torch.arange(b + 1, device=group.device))
    return rows.int(), pointers.int()


def _masked(features: Tensor, mask: Tensor, tau: Tensor, backend: str) -> Tensor:
    """The image-level losses' op with the mask as its weights: what it says of an anchor is linear in them."""
    _, v, _ = features.shape
    weights = mask.to(tau.dtype)
    total = weights.sum(dim=1) * v - weights.diagonal()  # no row is its own positive
    if v > 1:
        weights = weights.repeat_interleave(v, 0).repeat_interleave(v, 1)
    needs_grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (features, weights, tau))
    keep = _mlc.numbers_to_keep(features, None, True, needs_grad, backend)
    x = _mlc.Inputs(
        features, None, None, None, None, weights, None, tau, _mlc.DENSE,
        threshold=0.0, alpha=1.0, beta=1.0, include_batch=True, normalize=False, keep=keep,
    )  # fmt: skip
    rows = _mlc.mlc(x, backend).row_loss
    return rows / torch.where(total > 0, total, 1.0)[:, None]
