"""Compaction of labels in plain torch operators."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks


def compact(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.compact.Active`) from ``x.labels``; no shape depends on the data."""
    labels = x.labels
    if _checks.reads_values(labels):
        _checks.check_label_values(labels)
    b, c = labels.shape
    out.target.copy_(labels)
    active = (out.target == 1).t().contiguous()  # [C, B]
    out.class_ptr[:1] = 0
    out.class_ptr[1:] = active.sum(dim=1).cumsum(0)
    flat = active.flatten()
    # Inactive pairs all land in one spare slot behind the buffer.
    slot = torch.where(flat, flat.cumsum(0) - 1, b * c)
    pair = torch.arange(b * c, dtype=torch.int32, device=labels.device).reshape(b, c).t().flatten()
    pairs = torch.zeros(b * c + 1, dtype=torch.int32, device=labels.device)
    pairs.scatter_(0, slot, torch.where(flat, pair, 0))
    out.pairs.copy_(pairs[:-1])
