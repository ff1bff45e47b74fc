"""What the metrics accept, and the one form everything behind them works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sadcl._checks import check_floating, check_same_device, check_tensor

Array: TypeAlias = Tensor | np.ndarray
Threshold: TypeAlias = float | Sequence[float] | Tensor | np.ndarray


def canonical(scores: Array, labels: Array, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Check the inputs and bring them into the one form that the metrics work on.

    Args:
        scores: [n, C] or [n], where ``dims`` allows; a tensor or an array. Masked places are ignored pairs.
        labels: the same shape; masked places are ignored pairs, sparse ones have zeros where nothing is stored.
        dims: the ranks that are allowed.

    Returns:
        scores float32 (float64 for float64), detached, and target int8 in {-1, 0, 1}, both on one device.
    """
    layout = "[n, C]" if dims == (2,) else "[n, C] or [n]"
    both_tensors = isinstance(scores, Tensor) and isinstance(labels, Tensor)
    (scores, unscored), (labels, unlabelled) = _as_tensor("scores", scores), _as_tensor("labels", labels)
    scores = check_tensor("scores", scores, dims, layout)
    labels = check_tensor("labels", labels, dims, layout)
    check_floating("scores", scores)
    if labels.shape != scores.shape:
        raise ValueError(f"labels: expected the shape of scores, {tuple(scores.shape)}, got {tuple(labels.shape)}")
    if scores.dim() == 2 and scores.shape[1] == 0:
        raise ValueError(f"scores: expected at least one class, got shape {tuple(scores.shape)}")
    if both_tensors:
        check_same_device("labels", labels, "scores", scores)
    # Results are float64, which not every accelerator has.
    device = scores.device if scores.device.type in ("cpu", "cuda") else torch.device("cpu")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.detach().to(device=device, dtype=dtype)
    if unscored is not None:
        scores = scores.masked_fill(unscored.to(device), 0.0)
    _check_no_nan(scores)
    ignored = [mask.to(device) for mask in (unscored, unlabelled) if mask is not None]
    labels = labels.detach().to(device)
    for mask in ignored:
        labels = labels.masked_fill(mask, 0)
    target = _canonical_labels(labels)
    for mask in ignored:
        target = target.masked_fill(mask, -1)
    return scores, target


def _as_tensor(name: str, value: object) -> tuple[Tensor, Tensor | None]:
    """A plain tensor, sharing memory with ``value`` where possible, and where it is masked (None: nowhere)."""
    if isinstance(value, torch.masked.MaskedTensor):
        return value.get_data(), ~value.get_mask()
    if isinstance(value, np.ma.MaskedArray):
        mask = np.ma.getmask(value)
        return _from_numpy(name, value.data), None if mask is np.ma.nomask else torch.from_numpy(mask.copy())
    return _plain(name, value) if isinstance(value, Tensor) else _from_numpy(name, value), None


def _plain(name: str, value: Tensor) -> Tensor:
    """``value`` with an address to read from: dense, and nothing lazy about it."""
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ or value.is_nested:
        raise TypeError(f"{name}: expected a plain tensor, got {type(value).__name__} {value.layout}")
    if value.layout != torch.strided:
        if name != "labels":
            raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
        value = value.to_dense()
    if value._is_zerotensor():
        return torch.zeros_like(value)
    return value.resolve_conj().resolve_neg()


def _from_numpy(name: str, value: object) -> Tensor:
    """A numpy array of real numbers as a tensor, sharing memory where possible."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a torch.Tensor or numpy array, got {type(value).__name__}")
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected a real dtype of at most 64 bits, got {value.dtype}")
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:
        value = value.astype(np.float64)  # torch's wide unsigned types lack most operations
    value = np.require(value, dtype=value.dtype.newbyteorder("="), requirements=["C", "W"])
    return torch.from_numpy(value)


def _check_no_nan(scores: Tensor) -> None:
    """Raise if a score is NaN. The sum is ten times cheaper than isnan; inf - inf makes it NaN too."""
    if scores.sum().isnan():
        count = int(scores.isnan().sum())
        if count:
            raise ValueError(f"scores: expected no NaN, got {count} NaN among {scores.numel()} scores")


def _canonical_labels(labels: Tensor) -> Tensor:
    """``labels`` as int8 in {-1, 0, 1}."""
    if labels.dtype == torch.bool:
        return labels.to(torch.int8)
    if labels.is_complex():
        raise TypeError(f"labels: expected a real dtype, got {labels.dtype}")
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
        labels = labels.to(torch.float64)
    wrong = (labels != 0) & (labels != 1)
    if labels.dtype != torch.uint8:  # an unsigned 255 must not pass as -1
        wrong &= labels != -1
    if wrong.any():
        values = labels[wrong].unique()
        shown = ", ".join(f"{v:g}" for v in values[:5].tolist()) + (", ..." if len(values) > 5 else "")
        raise ValueError(f"labels: expected 0, 1 or -1 (ignored), got values {shown}")
    return labels.to(torch.int8)


def canonical_threshold(threshold: Any) -> float | tuple[float, ...]:
    """A float, or a tuple of floats for one threshold per class."""
    kind = type(threshold).__name__
    if isinstance(threshold, np.ma.MaskedArray):
        raise TypeError(f"threshold: expected a number or one per class, got {kind} {threshold!r}")
    if isinstance(threshold, Tensor):
        threshold = threshold.detach().cpu().double().numpy()
    try:
        values = np.asarray(threshold)
    except (TypeError, ValueError):  # ragged
        values = np.asarray(None)
    if values.dtype.kind not in "iuf" and values.size:
        raise TypeError(f"threshold: expected a number or one per class, got {kind} {threshold!r}")
    values = values.astype(np.float64)
    if values.ndim > 1 or values.size == 0:
        raise ValueError(f"threshold: expected a number or shape [C], got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"threshold: expected no NaN, got {int(np.isnan(values).sum())} NaN")
    return float(values) if values.ndim == 0 else tuple(values.tolist())
