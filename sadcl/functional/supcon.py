"""The single-label supervised contrastive loss as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import resolve
from ..ops import mlc as _mlc
from ..ops import sscl as _sscl
from ..ops._transforms import watched
from . import _arguments as arguments
from ._reduce import REDUCTIONS

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
        sample_weight: ``[B]``, multiplies the loss of an image's anchors.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, temperature, choices or weights; both ``labels`` and ``mask``.
        RuntimeError: a backend asked for by name cannot run.
    """
    if isinstance(features, Tensor) and features.dim() > 3:
        features = features.flatten(2)
    check.check_tensor("features", features, (3,), "[B, V, D] or [B, V, ...]")
    check.check_floating("features", features)
    check.check_nonempty("features", features)
    check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check.check_choice("reduction", reduction, REDUCTIONS)
    if labels is not None and mask is not None:
        raise ValueError("labels and mask: expected at most one of them, got both")
    b, v, _ = features.shape
    tau = check.as_temperature(temperature, features)
    scale = arguments.check_scale(tau, base_temperature, features)
    weights = arguments.check_weights(None, sample_weight, b, None, features)

    if mask is not None:
        arguments.check_mask(mask, b, features)
        if not watched(mask):  # there the op speaks of weights
            _mlc.check_weight_values(mask, "mask")
        name = resolve(backend, "supcon with a mask", features.device, _mlc.mlc.backends)
        if name == "reference":
            rows = reference.supcon(features, mask, tau)
        else:
            rows = _masked(features, mask, tau, name)
    else:
        group = arguments.check_groups(labels, b, features)
        name = resolve(backend, "supcon", features.device, BACKENDS)
        if name == "reference":
            rows = reference.supcon(features, group[:, None] == group[None, :], tau)
        else:
            pairs, group_ptr = _group_rows(group)
            views = features[:, :, None]
            keep = _sscl.scores_to_keep(views, pairs, group_ptr, tau, name)
            x = _sscl.Inputs(views, pairs, group_ptr, tau, normalize=False, released=False, keep=keep)
            rows = _sscl.sscl(x, name).row_loss[:, :, 0]
    rows = rows.to(tau.dtype)
    if contrast_mode == "one":
        rows = rows[:, :1]
    if scale is not None:
        rows = rows * scale
    rows = weights.apply(rows)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


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
