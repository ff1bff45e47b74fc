"""Oracle of the image-level multi-label contrastive losses (MLC), in float64."""

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
    own = torch.eye(b * v, z.shape[0], dtype=torch.bool, device=z.device) & include_batch
    if weights is not None:
        w = weights.double().masked_fill(own, 0.0)
        positive = w != 0
    else:
        assert labels is not None
        y = labels.long().repeat_interleave(v, 0)
        of_keys = y[:0] if key_labels is None else key_labels.long()
        y_columns = torch.cat([y if include_batch else y[:0], of_keys])
        other = ~own[:, : y_columns.shape[0]]
        w, positive = _weights(y, y_columns, other, weighting, threshold, alpha, class_weight)

    inputs = (x, keys, prototypes, weights, class_weight, temperature)
    nothing = sum(part.reshape(-1)[:0].sum().double() for part in inputs if isinstance(part, Tensor))
    losses = torch.zeros(b * v, dtype=torch.float64, device=z.device) + nothing
    (anchors,) = positive.any(dim=1).nonzero(as_tuple=True)  # of the others no feature may be looked at
    if anchors.numel() == 0:
        return losses.reshape(b, v)
    w, own = w[anchors], own[anchors]
    factor = torch.ones(z.shape[0], dtype=torch.float64, device=z.device)
    if prototypes is not None:
        factor[: -prototypes.shape[0]] = beta
    # Kernels make scores twice, and here the two cancel: a budget of roundings has to see both. The temperature's
    # gradient is a sum over anchors of what is left of each.
    by = torch.as_tensor(temperature, dtype=torch.float64, device=z.device).expand(anchors.numel(), 1)
    s, again = ((as_vectors(x[anchors]) @ z.t()) / by for _ in range(2))
    lse = torch.logsumexp((s + factor.log()).masked_fill(own, float("-inf")), 1)
    found = w.sum(dim=1) * lse - (w * again.masked_fill(own, 0.0)).sum(dim=1)
    return losses.index_put((anchors,), found).reshape(b, v)


def _weights(
    y: Tensor,
    y_columns: Tensor,
    other: Tensor,
    weighting: str,
    threshold: float,
    alpha: float,
    class_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``W`` and which columns are positives, of anchors ``y [N, C]`` and columns ``[M, C]``.

    ``other [N, M]`` says which columns an anchor has: not itself.
    """
    one, known, one_there, known_there = (y == 1).long(), (y != -1).long(), (y_columns == 1).long(), y_columns != -1

    def count(here: Tensor, there: Tensor) -> Tensor:  # whole numbers: exact
        return (here @ there.long().t()) * other

    both, own, theirs = count(one, one_there), count(one, known_there), count(known, one_there)
    either, met = own + theirs - both, count(known, known_there) > 0
    both, either, own, theirs = (number.double() for number in (both, either, own, theirs))
    safe = either.clamp(min=1.0)
    jaccard = both / safe
    scale = torch.ones(y.shape[1], dtype=torch.float64, device=y.device)
    scale = scale if class_weight is None else class_weight.double()
    if weighting == "all":
        positive = (both == either) & met
        raw = torch.ones_like(both)
    elif weighting == "any":
        positive, raw = both > 0, torch.ones_like(both)
    elif weighting == "jaccard":
        positive, raw = (either > 0) & (jaccard >= threshold), jaccard
    elif weighting == "simdis":
        positive, raw = both > 0, both / own.clamp(min=1.0) / (1.0 + theirs - both)
    elif weighting == "overlap":
        return jaccard / jaccard.sum(dim=1, keepdim=True).clamp(min=1e-300), both > 0
    elif weighting == "mulsupcon":
        partners = (other.long() @ one_there).double()
        share = scale * one / partners.clamp(min=1.0)
        return (share @ one_there.double().t()) * other, both > 0
    elif weighting == "msc":
        part = (alpha / safe) * other
        share = scale * one / (one * (1.0 + part @ one_there.double())).clamp(min=1e-300)
        return torch.cat([part * (share @ one_there.double().t()), share], 1), torch.cat([both > 0, one > 0], 1)
    else:
        raise ValueError(f"weighting: unknown {weighting!r}")
    return torch.where(positive, raw, 0.0) / positive.sum(dim=1, keepdim=True).clamp(min=1), positive
