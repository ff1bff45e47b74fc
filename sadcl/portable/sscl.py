"""SSCL in plain torch operators: compacted, closed-form gradient, blocks of rows instead of an N x N matrix.

Runs on any device. It reads the number of active pairs (a sync on a GPU), which the Triton kernels do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype

# A block of scores holds at most this many elements (64 MB of float32).
_BLOCK_ELEMENTS = 1 << 24
# A small problem (16 MB of scores) keeps for the backward what costs it one product of three.
_KEPT_ELEMENTS = 1 << 22
# So few features that a CPU keeps their whole gradient: the backward is one operator then.
_WHOLE_ELEMENTS = 1 << 15


def _is_small(n: int) -> bool:
    """Whether ``n`` rows of the paper's formulation go at once, not by blocks. What is kept does not decide: a
    checkpoint, or whoever watches, keeps nothing, and gets the same bits."""
    return 0 < n * n <= _KEPT_ELEMENTS


def scores_to_keep(n: int) -> int:
    """How many derivatives by the scores of ``n`` rows the forward keeps."""
    return n * n if _is_small(n) else 0


def gradient_to_keep(n: int, features: Tensor, turning: bool) -> int:
    """The same of the mean, whose gradient is known but for a factor: by ``n`` rows or all, and by the temperature."""
    if not _is_small(n) or features.numel() == 0:
        return 0
    return (features.numel() if _keeps_all(features) else n * features.shape[-1]) + turning


def _keeps_all(features: Tensor) -> bool:
    return features.device.type == "cpu" and features.numel() <= _WHOLE_ELEMENTS


class _Rows(NamedTuple):
    """The N compacted rows: where they come from, and what they hold."""

    image: Tensor  # [P] int64
    label: Tensor  # [P] int64
    z: Tensor  # [N, D] acc
    norm: Tensor  # [N] norm dtype
    inverse: Tensor  # [N, 1] 1 / norm, 0 for a zero row


class _Segments(NamedTuple):
    """Which rows are positives of each other."""

    group: Tensor  # [N] int64, the segment of class_ptr
    peers: Tensor  # [N] acc, number of positives
    groups: int


def _places(x: Any, count: int | None) -> tuple[Tensor, Tensor]:
    """Image and label of the active pairs, ``[P]`` each; None: as many as the classes hold (a device is waited for)."""
    pair, c = x.pairs[: int(x.class_ptr[-1]) if count is None else count].long(), x.features.shape[2]
    return pair // c, pair % c


def _gather(x: Any, normalize: bool, count: int | None = None) -> _Rows:
    image, label = _places(x, count)
    rows = x.features[image, :, label].flatten(0, 1)
    acc, wide = accumulation_dtype(rows.dtype), norm_dtype(rows.device)
    if not normalize:
        one = rows.new_ones(rows.shape[0], dtype=wide)
        return _Rows(image, label, rows.to(acc), one, one[:, None])
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(wide, rows.dtype)).to(wide)
    inverse = norm.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0)[:, None]
    return _Rows(image, label, (rows * inverse).to(acc), norm, inverse)


def _segments(class_ptr: Tensor, v: int, acc: torch.dtype) -> _Segments:
    counts = class_ptr.diff().long()
    group = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts).repeat_interleave(v)
    return _Segments(group, (counts[group] * v - 1).to(acc), counts.shape[0])


def _group_sum(segments: _Segments, values: Tensor) -> Tensor:
    """Sum ``values [N, D]`` over each group: ``[K, D]``."""
    return values.new_zeros(segments.groups, values.shape[1]).index_add_(0, segments.group, values)


def _blocks(n: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // max(n, 1))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _products(z: Tensor, block: slice) -> Tensor:
    """``z_i . z_j`` of a block of rows with all, ``-inf`` with itself: ``[block, N]``."""
    products = z[block] @ z.t()
    products.diagonal(block.start).fill_(float("-inf"))
    return products


def _whole(x: Any, rows: _Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """All scores at once: minus the rows' losses in parts ``[N, N]``, and their derivatives by the scores ``[N, N]``.

    A small problem is bound by the number of operators, not by what they do: these are few.
    """
    z, v = rows.z, x.features.shape[1]
    index = torch.arange(z.shape[0], dtype=torch.int32, device=z.device)
    group = torch.searchsorted(x.class_ptr[1:] * v, index, right=True)
    same = (group[:, None] == group).fill_diagonal_(False)
    peers = same.sum(dim=1, keepdim=True, dtype=z.dtype)
    # A row's lowest number instead of -inf: where it is alone, it is its own pivot.
    products = z.mm(z.t()).fill_diagonal_(torch.finfo(z.dtype).min)
    log_p = products.sub_(products.amax(dim=1, keepdim=True)).div_(temperature).log_softmax(dim=1)
    share = same / peers.clamp(min=1)
    # An anchor without a positive takes no part.
    by_score = log_p.exp().mul_(peers.clamp_(max=1)).sub_(share)
    return share.mul_(log_p.fill_diagonal_(0.0)), by_score


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.sscl.Inputs`."""
    b, v, c, _ = x.features.shape
    rows = _gather(x, x.normalize)
    if _is_small(rows.z.shape[0]) and not x.released:
        likelihood, by_score = _whole(x, rows, _number(x.temperature))
        loss, out = -likelihood.sum(dim=1), _kept(by_score.view(-1), x, rows)
    else:
        loss, out = _losses(x, rows, x.released)
    row_loss = loss.new_zeros(b, v, c)
    row_loss[rows.image, :, rows.label] = loss.view(rows.image.shape[0], v)
    return {"row_loss": row_loss, **out}


def forward_mean(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.sscl.MeanInputs`: with ``keep`` the gradient, too, of which all is known."""
    v, d = x.features.shape[1], x.features.shape[3]
    everywhere = _keeps_all(x.features)
    rows = _gather(x, True, _pairs_of(x.keep, v * d) if x.keep and not everywhere else None)
    n = rows.z.shape[0]
    if not _is_small(n):
        loss, out = _losses(x, rows, released=False)
        return {"mean": loss.sum() / max(n, 1), **out}
    temperature = _number(x.temperature)
    likelihood, by_score = _whole(x, rows, temperature)
    kept = rows.z[:0, 0]
    if x.keep:
        kept, of_temperature = _gradient_of_mean(rows, by_score, temperature)
        kept = (_scattered(kept, x, rows.image, rows.label, kept.dtype) if everywhere else kept).view(-1)
        if x.keep > kept.shape[0]:
            kept = torch.cat([kept, of_temperature()])
    return {"mean": likelihood.sum() / -n, **_kept(kept, x, rows)}


def _pairs_of(kept: int, width: int) -> int | None:
    """How many pairs of image and label have kept so many numbers, one of which may be the temperature's."""
    return kept // width if width > 1 else None


def _gradient_of_mean(rows: _Rows, by_score: Tensor, temperature: float) -> tuple[Tensor, Callable[[], Tensor]]:
    """By the features' active rows ``[N, D]``, and what gives that by the temperature ``[1]``."""
    z = rows.z
    g = (by_score + by_score.t()).mm(z)
    scale = 1.0 / (temperature * z.shape[0])
    radial = torch.linalg.vecdot(z, g)
    gradient = (g.addcmul_(z, radial[:, None], value=-1) * (rows.inverse * scale)).to(z.dtype)
    return gradient, lambda: radial.sum()[None] * (scale / (-2.0 * temperature))


def _number(temperature: Tensor) -> float:
    _checks.check_positive("temperature", temperature)
    return temperature.item()


def _kept(kept: Tensor, x: Any, rows: _Rows) -> dict[str, Tensor]:
    """Outputs of which the backward reads ``kept`` alone, where it is kept."""
    capacity = x.pairs.shape[0] * x.features.shape[1]
    wide = norm_dtype(kept.device)
    if not x.keep:  # to whoever watches, what is not read is the same every time
        norm = kept.new_zeros(capacity, dtype=wide)
        norm[: rows.norm.shape[0]] = rows.norm
        return {"lse": kept.new_zeros(2, capacity), "norm": norm, "kept": kept[:0]}
    return {"lse": kept.new_empty(2, capacity), "norm": kept.new_empty(capacity, dtype=wide), "kept": kept}


def _losses(x: Any, rows: _Rows, released: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows' losses ``[N]``, and what the backward reads: by blocks."""
    b, v, c, _ = x.features.shape
    temperature = x.temperature
    _checks.check_positive("temperature", temperature)
    z, n = rows.z, rows.z.shape[0]
    capacity = x.pairs.shape[0] * v
    segments = _segments(x.class_ptr, v, z.dtype)
    positives = _group_sum(segments, z)[segments.group] - z
    mean_positive = (z * positives).sum(dim=1) / temperature / segments.peers.clamp(min=1)
    pivot, log_sum = z.new_empty(n), z.new_empty(n)
    for block in _blocks(n):
        products = _products(z, block)
        highest = products.amax(dim=1)
        pivot[block] = highest.clamp(min=0.0) if released else highest
        total = torch.exp((products - pivot[block, None]) / temperature).sum(dim=1)
        log_sum[block] = torch.log(total + 1e-5 if released else total)
    if released:
        mean_positive = mean_positive - _mean_pair_maximum(rows, segments, b, v, c, temperature)
    has_positive = segments.peers > 0
    loss = log_sum - mean_positive if released else pivot / temperature + log_sum - mean_positive
    lse, norm = z.new_zeros(2, capacity), rows.norm.new_zeros(capacity)
    lse[0, :n] = pivot.masked_fill(~has_positive, 0.0)
    lse[1, :n] = log_sum.masked_fill(~has_positive, float("inf"))
    norm[:n] = rows.norm
    return torch.where(has_positive, loss, 0.0), {"lse": lse, "norm": norm, "kept": z.new_empty(0)}


def _mean_pair_maximum(rows: _Rows, segments: _Segments, b: int, v: int, c: int, temperature: Tensor) -> Tensor:
    """The mean over a row's positives of ``R`` (see the oracle): ``[N]``. Blocked over (image, view)s."""
    views = torch.arange(v, device=rows.z.device)
    image_view = (rows.image[:, None] * v + views).reshape(-1)
    label = rows.label.repeat_interleave(v)
    active = rows.z.new_zeros(b * v, c)
    active[image_view, label] = 1.0
    ends = torch.bincount(segments.group, minlength=segments.groups).cumsum(0).tolist()
    starts = [0, *ends][:-1]
    total = rows.z.new_zeros(rows.z.shape[0])
    for block in _blocks(b * v):
        shares_all = active[block] @ active.t() == c
        maximum = torch.where(shares_all, float("-inf"), 0.0).to(rows.z.dtype)
        members = []
        for start, end in zip(starts, ends, strict=True):
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
    return total / segments.peers.clamp(min=1)


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of features and temperature by the closed form of docs/architecture.md."""
    rows = _gather(x, x.normalize)
    n = rows.z.shape[0]
    m = upstream.grad_row_loss[rows.image, :, rows.label].reshape(-1).to(rows.z.dtype)
    if _is_small(n) and not x.released:
        by_score = saved.kept if saved.kept.numel() else _whole(x, rows, _number(x.temperature))[1]
        weight = by_score.view(n, n) * m[:, None]
        g = (weight + weight.t()) @ rows.z
    else:
        g = _over_blocks(m, x, rows.z, saved)
    return _gradients(g, x, rows, x.normalize)


def backward_mean(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The same of the mean, the temperature's where it is wanted."""
    kept, grad_mean, (_, v, _, d) = saved.kept, upstream.grad_mean, x.features.shape
    everywhere = _keeps_all(x.features) and kept.numel() > 0
    if everywhere:
        given = kept * grad_mean
        of_features = given[: x.features.numel()].view(x.features.shape)
        if math.isfinite(grad_mean.item()):
            of_features = of_features.to(x.features.dtype)
        else:  # inactive rows are 0 still
            image, label = _places(x, None)
            of_features = _scattered(of_features[image, :, label], x, image, label)
    elif kept.numel():
        given, places = kept * grad_mean, _places(x, _pairs_of(kept.numel(), v * d))
        of_features = _scattered(given[: places[0].shape[0] * v * d], x, *places)
    else:
        rows = _gather(x, normalize=True)
        n = rows.z.shape[0]
        if not _is_small(n):
            return _gradients(_over_blocks((grad_mean / max(n, 1)).expand(n), x, rows.z, saved), x, rows, True)
        temperature = _number(x.temperature)
        gradient, of_temperature = _gradient_of_mean(rows, _whole(x, rows, temperature)[1], temperature)
        of_features = _scattered(gradient * grad_mean, x, rows.image, rows.label)
        given = of_temperature() * grad_mean if "temperature" in wanted else gradient
    result = {"grad_features": of_features}
    if "temperature" in wanted:
        result["grad_temperature"] = given[-1].clone()
    return result


def _gradients(g: Tensor, x: Any, rows: _Rows, normalize: bool) -> dict[str, Tensor]:
    """From ``temperature`` times the gradient by ``z``."""
    temperature, z = x.temperature, rows.z
    radial = torch.linalg.vecdot(z, g)
    if normalize:
        g = g.addcmul_(z, radial[:, None], value=-1)
    return {
        "grad_features": _scattered(g * (rows.inverse / temperature), x, rows.image, rows.label),
        "grad_temperature": radial.sum() / (-2.0 * temperature * temperature),
    }


def _scattered(of_rows: Tensor, x: Any, image: Tensor, label: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros but for the active rows, in the features' dtype if no other is asked for."""
    _, v, _, d = x.features.shape
    grad = x.features.new_zeros(x.features.shape, dtype=dtype)
    grad[image, :, label] = of_rows.view(image.shape[0], v, d).to(grad.dtype)
    return grad


def _over_blocks(m: Tensor, x: Any, z: Tensor, saved: Any) -> Tensor:
    """``temperature`` times the gradient by ``z``, from the log-sum-exps."""
    n, temperature = z.shape[0], x.temperature
    segments = _segments(x.class_ptr, x.features.shape[1], z.dtype)
    pivot, log_sum = saved.lse[:, :n]
    m = torch.where(torch.isposinf(log_sum), 0.0, m)
    g = torch.zeros_like(z)
    for block in _blocks(n):
        # Both sides from the rows' own products: z_j.z_i need not have the bits of z_i.z_j, and pivots are the rows'.
        products = _products(z, block)
        weight = m[block, None] * torch.exp((products - pivot[block, None]) / temperature - log_sum[block, None])
        if block.stop - block.start == n:
            g = (weight + weight.t()) @ z
            break
        g[block] += weight @ z
        g += weight.t() @ z[block]
    class_sum, weighted_sum = _group_sum(segments, z), _group_sum(segments, m[:, None] * z)
    numerator = m[:, None] * class_sum[segments.group] + weighted_sum[segments.group] - 2.0 * m[:, None] * z
    # peers = 0 leaves no numerator: m is 0 there, and the class sums are the row's own.
    return g - numerator / segments.peers.clamp(min=1)[:, None]
