"""Compaction of labels in plain torch operators."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks


def compact(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.compact.Active`) from ``x.labels``; no shape depends on the data."""
    labels = x.labels
    b, c = labels.shape
    out.target.copy_(labels)
    if _checks.reads_values(labels):  # the host waits anyway, so it may wait for a count
        _checks.check_label_values(labels)
        label, image = (labels.t() == 1).nonzero().t().contiguous()
        out.pairs.zero_()[: label.shape[0]] = torch.add(label, image, alpha=c)
        torch.searchsorted(label, torch.arange(c + 1, device=labels.device), out_int32=True, out=out.class_ptr)
        return
    active = (labels.t() == 1).flatten()  # [C * B]
    rank = active.cumsum(0)
    out.class_ptr[:1] = 0
    out.class_ptr[1:] = rank[b - 1 :: b]
    # Inactive pairs all land in one spare slot before the buffer.
    pair = torch.arange(b * c, dtype=torch.int32, device=labels.device).view(b, c).t().flatten()
    pairs = pair.new_zeros(b * c + 1).scatter_(0, rank.mul_(active), pair)
    out.pairs.copy_(pairs[1:])
