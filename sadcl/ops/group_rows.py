"""Op ``group_rows``: SSCL, SupCon and the multi-label losses where the columns are the rows of all ranks of a group.

The collectives are inside: a compiler sees one op. Every rank calls it with the same options, or every rank gets the
same error (``signature``). On a GPU the host waits once, for how many rows the others bring, unless ``capacity`` says
how many there can be; without it a compiled graph, whose shapes may not depend on data, keeps nothing of what came, and
gathers again in the backward.

Of R own rows and N of all ranks: forward ``2 R N D`` flops, one sweep of own rows over the columns, which also counts
the partners; what stays are four numbers a row. The backward gathers four numbers a row and sweeps again, ``4 R N D``:
own rows receive as anchors and as columns, so no gradient is reduced, and nobody needs the other half of the symmetric
scores. ``cpp`` (:mod:`sadcl.portable.group_fused`) keeps no more than a block of scores, ``torch`` a block of a few
megabytes. Oracles: those of the losses on the concatenated batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..portable import group_fused as fused
from ..portable import group_rows as portable
from ..portable.group_pairs import IDS, MASK
from ..portable.group_sweep import gathered_bytes
from ..portable.mlc import DENSE, MSC, MULSUPCON, WEIGHTINGS
from ._library import Backward, Op
from ._native import native
from ._transforms import watched

__all__ = ["DENSE", "IDS", "MASK", "MSC", "WEIGHTINGS", "Inputs", "Outputs", "group_rows", "what_to_keep"]


class Inputs(NamedTuple):
    """This rank's part of a batch. Items are the pairs of SSCL, elsewhere images; an item has V rows."""

    features: Tensor  # [B, V, C, D] of any strides; C is 1 but for SSCL; B may be 0
    pairs: Tensor | None  # int32 [P], see sadcl.ops.compact.Active (SSCL)
    class_ptr: Tensor | None  # int32 [C + 1]
    ids: Tensor | None  # int64 [B]: rows with the same number are positives (SupCon)
    labels: Tensor | None  # [B, classes]: 1, 0, -1 (multi-label)
    keys: Tensor | None  # [K, D], the same on all ranks, as all that follows
    key_labels: Tensor | None  # [K, classes]
    prototypes: Tensor | None  # [classes, D], with msc
    weights: Tensor | None  # [own rows, rows of all ranks + K]
    class_weight: Tensor | None  # [classes] in the accumulation dtype, with mulsupcon and msc
    temperature: Tensor  # [] in the accumulation dtype
    weighting: int  # index into WEIGHTINGS, or DENSE, MASK (weights over their sum), IDS
    threshold: float
    alpha: float
    beta: float
    include_batch: bool  # the rows are columns
    normalize: bool  # use x / |x|; otherwise x as it is
    released: bool  # the released code's value, normaliser and anchors (SSCL)
    ring: bool  # vectors go round instead of being gathered
    capacity: int  # the most items of a rank; 0: the host finds out
    keep: int  # items of a rank to keep for the backward: 0, capacity, or -1 for as many as there are
    signature: str  # what ranks must agree in
    group: str  # "": this process alone
    rank: int
    world: int


class Outputs(NamedTuple):
    """The loss of own rows, and what the backward reads."""

    row_loss: Tensor  # accumulation dtype [B, V, C], 0 where inactive
    size: Tensor  # int64 [2]: rows of all ranks, and their labels
    stats: Tensor  # accumulation dtype [4, rows]: pivot, log-sum, sum of weights, factor of weights
    share: Tensor  # [rows, classes] with mulsupcon and msc, else [0]
    counts: Tensor  # int64 [3, world]: items, images, labels of the ranks
    kept: Tensor  # uint8 [world, bytes] of what they sent, or [0]


def what_to_keep(capacity: int, features: Tensor) -> int:
    """How many items of a rank the forward keeps: none unless a backward may come."""
    if not torch.is_grad_enabled():
        return 0
    return capacity if capacity or watched(features) or features.is_meta else -1


def allocate(x: Inputs) -> Outputs:
    """Outputs of their shapes."""
    b, v, c, _ = x.features.shape
    acc = accumulation_dtype(x.features.dtype)
    new = x.features.new_empty
    rows = (b if x.pairs is None else x.pairs.shape[0]) * v
    share: Any = 0
    if x.weighting in (MULSUPCON, MSC):
        assert x.labels is not None
        share = (b * v, x.labels.shape[1])
    kept = x.keep > 0 and x.include_batch
    return Outputs(
        row_loss=new((b, v, c), dtype=acc),
        size=new(2, dtype=torch.int64),
        stats=new((4, rows), dtype=acc),
        share=new(share, dtype=acc),
        counts=new((3, x.world), dtype=torch.int64),
        kept=new((x.world, gathered_bytes(x, x.capacity)) if kept else 0, dtype=torch.uint8),
    )


_CPP = fused.Kernels(native("group_rows_forward"), native("group_rows_backward"))

group_rows = Op(
    "group_rows",
    Inputs,
    Outputs,
    allocate,
    {"cpp": functools.partial(fused.forward, kernels=_CPP), "torch": portable.forward},
    Backward(
        gradients=("features", "keys", "prototypes", "weights", "class_weight", "temperature"),
        implementations={"cpp": functools.partial(fused.backward, kernels=_CPP), "torch": portable.backward},
        partial=True,
        instead="the loss of one process, backend='reference'",
    ),
)
