"""Labels compacted once for all losses, and what they hold, as functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._backends import resolve
from ..ops import compact as _compact
from ..ops.compact import Active

BACKENDS = _compact.BACKENDS


class ContrastiveStats(NamedTuple):
    """What a contrastive loss worked on, as 0-d tensors (nothing is read back from the device).

    Attributes:
        anchors: anchors with at least one positive.
        positives: (anchor, positive) pairs.
    """

    anchors: Tensor
    positives: Tensor


def compact_labels(labels: Tensor, backend: str | None = None, *, capacity: int | None = None) -> Active:
    """Compact labels once for several losses; pass the result as their ``active=``.

    Args:
        labels: ``[B, C]`` of any real dtype (but float8 and unsigned ones above uint8); 1 active, 0 not, -1 ignored.
        backend: ``None``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"torch"``.
        capacity: the most active pairs there can be; the losses' buffers follow it. Default: ``B * C``.

    Returns:
        :class:`sadcl.ops.compact.Active`, whose docstring has a worked example.

    Raises:
        ValueError: if the rank is not 2, a dimension is empty, or (on a CPU, or with ``SADCL_CHECK=1``) a value is
            something else, or there are more active pairs than ``capacity``. (On a GPU without the check the losses
            become NaN then, and :attr:`Active.overflowed` is true.)
        TypeError: if ``labels`` is no dense tensor of real numbers.
    """
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_nonempty("labels", labels)
    check.check_real("labels", labels)
    name = resolve(backend, "compact", labels.device, BACKENDS, tuple(labels.shape))
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity: expected None or an integer > 0, got {capacity!r}")
    return _compact.compact(labels, capacity, "torch" if name == "reference" else name)


def contrastive_stats(labels: Tensor, views: int = 1, *, active: Active | None = None) -> ContrastiveStats:
    """Count the anchors and positives that SSCL finds in ``labels [B, C]`` with ``views`` views of every image.

    A loss of 0 because nothing could be contrasted is thereby told from a perfect one.
    """
    if active is None:
        active = compact_labels(labels)
    rows = active.class_ptr.diff().long() * views
    return ContrastiveStats(torch.where(rows > 1, rows, 0).sum(), (rows * (rows - 1).clamp(min=0)).sum())


def check_active(active: Active | None, labels: Tensor, name: str) -> Active:
    """``active``, or ``labels [B, C]``, which were checked, compacted by the backend ``name``."""
    if active is None:
        return _compact.compact(labels, None, name if name in BACKENDS else "torch")
    if not isinstance(active, Active):
        raise TypeError(f"active: expected the result of compact_labels, got {type(active).__name__}")
    if active.target.shape != labels.shape:
        raise ValueError(f"active: expected it from labels {tuple(labels.shape)}, got {tuple(active.target.shape)}")
    for part in active:
        check.check_same_device("active", part, "labels", labels)
    return active
