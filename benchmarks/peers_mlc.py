"""Peers of the image-level losses: the formula in torch operators, from the published form to the leanest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE, THRESHOLD = 0.1, 0.3


def pair_weights(y: Tensor, other: Tensor, weighting: str, square: bool) -> Tensor:
    """``W [N, columns]``, dense."""
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device) if square else torch.zeros(1, 1, dtype=torch.bool)
    both, own, theirs = y @ other.t(), y.sum(1, keepdim=True), other.sum(1)
    if weighting == "mulsupcon":
        partners = other.sum(0) - (y if square else 0.0)
        return ((y / partners.clamp(min=1)) @ other.t()).masked_fill(itself, 0.0)
    value = torch.ones_like(both)
    if weighting == "jaccard":
        value = both / (own + theirs - both).clamp(min=1)
    elif weighting == "simdis":
        value = both / own.clamp(min=1) / (1 + theirs - both)
    positive = (value >= THRESHOLD if weighting == "jaccard" else both > 0) & ~itself
    return value * positive / positive.sum(1, keepdim=True).clamp(min=1)


def _mean(rows: Tensor, y: Tensor, weighting: str) -> Tensor:
    return rows.sum() / (y.sum() if weighting == "mulsupcon" else len(y))


def dense(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """The formula as one writes it."""
    z = normalize(x, dim=1)
    columns = z if keys is None else normalize(keys, dim=1)
    s = z @ columns.t() / TEMPERATURE
    if keys is None:
        s = s.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), float("-inf"))
    w = pair_weights(y, y if key_labels is None else key_labels, weighting, keys is None)
    log_probability = torch.log_softmax(s, dim=1).masked_fill(w == 0, 0.0)
    return _mean(-(w * log_probability).sum(1), y, weighting)


def leanest(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """``lam lse - z . (W z)``: one matrix of scores, one of weights."""
    z = normalize(x, dim=1)
    columns = z if keys is None else normalize(keys, dim=1)
    s = z @ columns.t() / TEMPERATURE
    if keys is None:
        s = s.fill_diagonal_(float("-inf"))
    with torch.no_grad():
        w = pair_weights(y, y if key_labels is None else key_labels, weighting, keys is None)
    pull = (z * (w @ columns)).sum(1) / TEMPERATURE
    return _mean(w.sum(1) * torch.logsumexp(s, dim=1) - pull, y, weighting)


def published(x: Tensor, y: Tensor, keys: Tensor | None, key_labels: Tensor | None, weighting: str) -> Tensor:
    """MultiSupCon as its authors describe it: labels compared pair by pair in Python, then dense."""
    assert keys is None and weighting == "jaccard"
    w, has = x.new_zeros(len(x), len(x)), y == 1
    for i in range(len(x)):
        for j in range(len(x)):
            overlap = (has[i] & has[j]).sum() / (has[i] | has[j]).sum().clamp(min=1)
            if i != j and overlap >= THRESHOLD:
                w[i, j] = overlap
    w = w / (w > 0).sum(1, keepdim=True).clamp(min=1)
    z = normalize(x, dim=1)
    s = (z @ z.t() / TEMPERATURE).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), float("-inf"))
    return _mean(-(w * torch.log_softmax(s, dim=1).masked_fill(w == 0, 0.0)).sum(1), y, weighting)
