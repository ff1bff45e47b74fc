"""SSCL in plain torch operators: compacted, closed-form gradient, blocks of rows instead of an N x N matrix.

Runs on any device. It reads the number of active pairs (a sync on a GPU), which the Triton kernels do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype

# A block of scores holds at most this many elements (64 MB of float32).
_BLOCK_ELEMENTS = 1 << 24
# Scores of a small problem are kept for the backward (16 MB): one product of three.
_KEPT_ELEMENTS = 1 << 22


def scores_to_keep(n: int) -> int:
    """How many scores of ``n`` rows the forward keeps."""
    return n * n if n * n <= _KEPT_ELEMENTS else 0


class _Rows(NamedTuple):
    """The N compacted rows: where they come from, what class they have, what they hold."""

    image: Tensor  # [P] int64
    label: Tensor  # [P] int64
    group: Tensor  # [N] int64, the segment of class_ptr
    peers: Tensor  # [N] acc, number of positives
    z: Tensor  # [N, D] acc
    norm: Tensor  # [N] norm dtype
    n_groups: int


def _gather(features: Tensor, pairs: Tensor, class_ptr: Tensor, normalize: bool) -> _Rows:
    _, v, c, _ = features.shape
    acc = accumulation_dtype(features.dtype)
    pair = pairs[: int(class_ptr[-1])].long()
    image, label = pair // c, pair % c
    counts = class_ptr.diff().long()
    group = torch.repeat_interleave(torch.arange(counts.shape[0], device=pair.device), counts).repeat_interleave(v)
    peers = (counts[group] * v - 1).to(acc)
    x = features[image, :, label].flatten(0, 1)
    wide = norm_dtype(features.device)
    if normalize:
        norm = torch.linalg.vector_norm(x.to(wide), dim=1)
        z = (x.to(wide) / torch.where(norm == 0, 1.0, norm)[:, None]).to(acc)  # a zero row stays one
    else:
        norm = torch.ones(x.shape[0], dtype=wide, device=x.device)
        z = x.to(acc)
    return _Rows(image, label, group, peers, z, norm, counts.shape[0])


def _group_sum(rows: _Rows, values: Tensor) -> Tensor:
    """Sum ``values [N, D]`` over each group: ``[K, D]``."""
    return values.new_zeros(rows.n_groups, values.shape[1]).index_add_(0, rows.group, values)


def _blocks(n: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // max(n, 1))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _products(z: Tensor, block: slice) -> Tensor:
    """``z_i . z_j`` of a block of rows with all, ``-inf`` with itself: ``[block, N]``."""
    products = z[block] @ z.t()
    products.diagonal(block.start).fill_(float("-inf"))
    return products


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.sscl.Inputs`."""
    b, v, c, _ = x.features.shape
    temperature, released = x.temperature, x.released
    _checks.check_positive("temperature", temperature)
    rows = _gather(x.features, x.pairs, x.class_ptr, x.normalize)
    z, n = rows.z, rows.z.shape[0]
    mean_positive = (z * (_group_sum(rows, z)[rows.group] - z)).sum(dim=1) / temperature / rows.peers.clamp(min=1)
    pivot, log_sum, kept = z.new_empty(n), z.new_empty(n), z.new_empty(x.keep)
    for block in _blocks(n):
        products = _products(z, block)
        if x.keep == n * n:
            kept.copy_(products.view(-1))
        highest = products.amax(dim=1)
        pivot[block] = highest.clamp(min=0.0) if released else highest
        total = torch.exp((products - pivot[block, None]) / temperature).sum(dim=1)
        log_sum[block] = torch.log(total + 1e-5 if released else total)
    if released:
        mean_positive = mean_positive - _mean_pair_maximum(rows, b, v, c, temperature)
    has_positive = rows.peers > 0
    loss = log_sum - mean_positive if released else pivot / temperature + log_sum - mean_positive

    row_loss = z.new_zeros(b, v, c)
    row_loss[rows.image, :, rows.label] = torch.where(has_positive, loss, 0.0).reshape(rows.image.shape[0], v)
    capacity = x.pairs.shape[0] * v
    lse, norm = z.new_zeros(2, capacity), rows.norm.new_zeros(capacity)
    lse[0, :n] = pivot.masked_fill(~has_positive, 0.0)
    lse[1, :n] = log_sum.masked_fill(~has_positive, float("inf"))
    norm[:n] = rows.norm
    return {"row_loss": row_loss, "lse": lse, "norm": norm, "kept": kept}


def _mean_pair_maximum(rows: _Rows, b: int, v: int, c: int, temperature: Tensor) -> Tensor:
    """The mean over a row's positives of ``R`` (see the oracle): ``[N]``. Blocked over (image, view)s."""
    views = torch.arange(v, device=rows.z.device)
    image_view = (rows.image[:, None] * v + views).reshape(-1)
    label = rows.label.repeat_interleave(v)
    active = rows.z.new_zeros(b * v, c)
    active[image_view, label] = 1.0
    segments = torch.bincount(rows.group, minlength=rows.n_groups).cumsum(0).tolist()
    starts = [0, *segments][:-1]
    total = rows.z.new_zeros(rows.z.shape[0])
    for block in _blocks(b * v):
        shares_all = active[block] @ active.t() == c
        maximum = torch.where(shares_all, float("-inf"), 0.0).to(rows.z.dtype)
        members = []
        for start, end in zip(starts, segments, strict=True):
            here = image_view[start:end]
            inside = (here >= block.start) & (here < block.stop)
            mine, local = torch.arange(start, end, device=here.device)[inside], here[inside] - block.start
            if mine.numel() == 0:
                continue
            s = rows.z[mine] @ rows.z[start:end].t() / temperature
            maximum[local[:, None], here] = torch.maximum(maximum[local[:, None], here], s)
            members.append((mine, local, here))
        for mine, local, here in members:
            # A row is no positive of itself.
            total[mine] = maximum[local[:, None], here].sum(dim=1) - maximum[local, image_view[mine]]
    return total / rows.peers.clamp(min=1)


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of features and temperature by the closed form of docs/architecture.md."""
    features, temperature, grad_rows = x.features, x.temperature, upstream.grad_row_loss
    v = features.shape[1]
    rows = _gather(features, x.pairs, x.class_ptr, x.normalize)
    z, n = rows.z, rows.z.shape[0]
    pivot, log_sum = saved.lse[:, :n]
    m = grad_rows[rows.image, :, rows.label].reshape(-1).to(z.dtype)
    m = torch.where(torch.isposinf(log_sum), 0.0, m)
    g = torch.zeros_like(z)
    for block in _blocks(n):
        # Both sides from the rows' own products: z_j.z_i need not have the bits of z_i.z_j, and pivots are the rows'.
        kept = saved.kept.numel() > 0 and saved.kept.numel() == n * n
        products = saved.kept.view(n, n) if kept else _products(z, block)
        weight = m[block, None] * torch.exp((products - pivot[block, None]) / temperature - log_sum[block, None])
        if block.stop - block.start == n:
            g = (weight + weight.t()) @ z
            break
        g[block] += weight @ z
        g += weight.t() @ z[block]
    class_sum, weighted_sum = _group_sum(rows, z), _group_sum(rows, m[:, None] * z)
    numerator = m[:, None] * class_sum[rows.group] + weighted_sum[rows.group] - 2.0 * m[:, None] * z
    # peers = 0 leaves no numerator: m is 0 there, and the class sums are the row's own.
    g = (g - numerator / rows.peers.clamp(min=1)[:, None]) / temperature
    radial = (z * g).sum(dim=1)
    grad_temperature = -radial.sum() / (2.0 * temperature)
    if x.normalize:
        scale = saved.norm[:n, None]
        tangential = (g - z * radial[:, None]).to(scale.dtype)
        none = scale == 0
        g = (tangential / torch.where(none, 1.0, scale)).masked_fill_(none, 0.0).to(z.dtype)
    grad_features = features.new_zeros(features.shape)
    grad_features[rows.image, :, rows.label] = g.reshape(rows.image.shape[0], v, features.shape[3]).to(features.dtype)
    return {"grad_features": grad_features, "grad_temperature": grad_temperature}
