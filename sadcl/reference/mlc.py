"""Oracle of the image-level multi-label contrastive losses (MLC), in float64, one anchor after another."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import unit


def mlc(
    features: Tensor,
    labels: Tensor | None,
    temperature: Tensor | float,
    weighting: str,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    prototypes: Tensor | None = None,
    weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    threshold: float = 0.3,
    alpha: float = 1.0,
    beta: float = 1.0,
    include_batch: bool = True,
    normalize: bool = True,
) -> Tensor:
    r"""Loss of every anchor, before its factor ``a_i`` and the reduction.

    Anchors are the rows ``i = (b, v)`` with the labels of their image. Columns ``j`` are the other rows (with
    ``include_batch``; a row is never its own column), then the keys, then (msc) the prototypes. With
    ``s_ij = z_i . z_j / temperature``, ``z`` unit vectors (``normalize=False``: as they are), and ``b_j = 1`` (msc:
    ``beta`` for rows and keys, 1 for prototypes):

        l_i = sum_j W_ij (lse_i - s_ij),      lse_i = log sum_j b_j exp(s_ij)

    ``I``, ``U``, ``|y_i|``, ``|y_j|`` count the classes that both, one of the two, i, j have, among the classes that
    neither ignores (-1); ``J = I / U``, 0 where U is 0. ``count_i`` is the number of positives, the columns for which
    the bracket holds; ``k_c`` is ``class_weight`` (1 without).

        all        [I = U, and a class known to both] / count_i           two empty sets are equal
        any        [I > 0] / count_i
        jaccard    J [U > 0 and J >= threshold] / count_i                 two empty sets are no positives
        overlap    J / sum_j J_ij
        simdis     I / |y_i| / (1 + |y_j| - I) [I > 0] / count_i
        mulsupcon  sum_c k_c y_ic y_jc / n_ic,                            n_ic = sum_j y_jc
        msc        sum_c k_c y_ic y_jc alpha / U_ij / m_ic                m_ic = y_ic + sum_j alpha y_ic y_jc / U_ij
                   k_c y_ic / m_ic for the prototype of class c
        weights    as given; the entry of a row with itself plays no part

    Sentinels: an anchor without a positive (no columns, no labels, no partner; in ``weights`` a row of zeros) has loss
    0 and no gradient, whatever its features hold; it remains a column of the others. A class without a partner adds 0.
    Labels of the same image agree, duplicates of a row are columns like any other. A zero vector has score 0 and
    gradient 0. NaN in a column makes every anchor with a positive NaN; NaN in an anchor makes that anchor NaN.

    Sources: "all", "any" Zhang and Wu (AAAI 2024); "mulsupcon" MulSupCon (AAAI 2024); "jaccard" MultiSupCon (NeurIPS
    workshop 2022); "overlap" Audibert et al. (arXiv 2412.00101); "simdis" Similarity-Dissimilarity (arXiv 2410.13439);
    "msc" MSC (arXiv 2404.08720).

    Args:
        features: ``[B, V, D]`` floating.
        labels: ``[B, C]`` with values in {-1, 0, 1}; None with ``weights``.
        temperature: number or 0-d tensor > 0.
        weighting: a name of the table; not used with ``weights``.
        keys: ``[K, D]``.
        key_labels: ``[K, C]``.
        prototypes: ``[C, D]``, for msc.
        weights: ``[B V, columns]``, >= 0.
        class_weight: ``[C]``, for mulsupcon and msc.
        threshold: of jaccard.
        alpha, beta: of msc.
        include_batch: whether the rows are columns.
        normalize: whether vectors are scaled to length 1.

    Returns:
        ``[B, V]`` float64.
    """
    b, v, d = features.shape
    as_vectors = unit if normalize else torch.clone
    x = features.double().reshape(b * v, d)
    columns = (x if include_batch else x[:0], keys, prototypes)
    z = torch.cat([as_vectors(part.double()) for part in columns if part is not None])
    y, y_columns = None, None
    if labels is not None:
        y = labels.to(torch.int8).repeat_interleave(v, 0)
        of_keys = y[:0] if key_labels is None else key_labels.to(torch.int8)
        y_columns = torch.cat([y if include_batch else y[:0], of_keys])

    inputs = (x, keys, prototypes, weights, class_weight, temperature)
    nothing = sum(part.reshape(-1)[:0].sum().double() for part in inputs if isinstance(part, Tensor))
    losses = []
    for i in range(b * v):
        other = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
        if include_batch:
            other[i] = False
        if weights is not None:
            w = weights[i].double()[other]
            positive = w != 0
        else:
            assert y is not None and y_columns is not None
            rows_and_keys = y_columns[other[: y_columns.shape[0]]]
            w, positive = _weights(y[i], rows_and_keys, weighting, threshold, alpha, class_weight)
        if not positive.any():
            losses.append(nothing)
            continue
        s = (z[other] @ as_vectors(x[i])) / temperature
        factor = torch.ones_like(s)
        if prototypes is not None:
            factor[: -prototypes.shape[0]] = beta
        # Kernels make scores twice, and here the two cancel: a budget of roundings has to see both.
        again = (z[other] @ as_vectors(x[i])) / temperature
        losses.append(w.sum() * torch.logsumexp(s + factor.log(), 0) - (w * again).sum())
    return torch.stack([torch.as_tensor(loss, device=z.device) for loss in losses]).reshape(b, v)


def _weights(
    y: Tensor, y_columns: Tensor, weighting: str, threshold: float, alpha: float, class_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``W_i`` and which columns are positives, of an anchor ``y [C]`` and its columns ``[M, C]``."""
    known = (y != -1) & (y_columns != -1)
    one, other = (y == 1) & known, (y_columns == 1) & known
    both = (one & other).sum(dim=1).double()
    either = (one | other).sum(dim=1).double()
    own, theirs = one.sum(dim=1).double(), other.sum(dim=1).double()
    safe = either.clamp(min=1.0)
    jaccard = both / safe
    scale = torch.ones_like(y, dtype=torch.float64) if class_weight is None else class_weight.double()
    if weighting == "all":
        positive = (both == either) & known.any(dim=1)
        raw = torch.ones_like(both)
    elif weighting == "any":
        positive, raw = both > 0, torch.ones_like(both)
    elif weighting == "jaccard":
        positive, raw = (either > 0) & (jaccard >= threshold), jaccard
    elif weighting == "simdis":
        positive, raw = both > 0, both / own.clamp(min=1.0) / (1.0 + theirs - both)
    elif weighting == "overlap":
        return jaccard / jaccard.sum().clamp(min=1e-300), both > 0
    elif weighting == "mulsupcon":
        shared = ((y == 1) & (y_columns == 1)).double()
        share = scale / shared.sum(dim=0).clamp(min=1.0)
        return (shared * share).sum(dim=1), both > 0
    elif weighting == "msc":
        shared = ((y == 1) & (y_columns == 1)) * (alpha / safe)[:, None]
        has = (y == 1).double()
        share = scale * has / (has + shared.sum(dim=0)).clamp(min=1e-300)
        return torch.cat([(shared * share).sum(dim=1), share]), torch.cat([both > 0, has > 0])
    else:
        raise ValueError(f"weighting: unknown {weighting!r}")
    return torch.where(positive, raw, 0.0) / positive.sum().clamp(min=1), positive
