"""Op ``sscl`` in one cooperative launch each way; with :func:`fused`, compaction too.

Any number of rows is computed, but few are what it is for: the blocks meet twice (in the backward twice for every
million weights), and what they exchange grows with the square of the rows that there is room for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import Program, blocks_that_fit, counters, launch, part_of
from ._types import type_of

THREADS = 256
TILE = 32  # rows and columns of a tile
TILE_BYTES = 8 * TILE * (TILE + 1) * 4  # of a tile's shares, one a warp
PLANES = 9  # numbers kept of a row, beside its vector
WEIGHTS = 1 << 20  # of the backward that are held at once: few enough for L2
FEW_ROWS = 1024  # of so many it is meant for, see _small.py
FEW_LABELS = 8192  # what every block of a fused launch compacts for itself


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def require_dtype(features: Tensor) -> None:
    if features.dtype == torch.float64:
        raise ValueError("features: backend='cuda' takes float32, bfloat16 and float16, got float64; use 'triton'")


def room_for(rows: int, depth: int) -> tuple[int, int, int]:
    """Rows in whole tiles; tiles; width of a staged row."""
    tiles = ceil_div(rows, TILE)
    return tiles * TILE, tiles, ceil_div(depth, 32) * 32


def grid_of(program: Program, items: int, rows: int, device: torch.device, shared: int = TILE_BYTES) -> int:
    """Blocks: all at once, and no more than tiles or, where those are few, rows to stage (8 a block)."""
    most = min(part_of(device).processors, blocks_that_fit(program, THREADS, shared, device))
    return max(1, min(most, max(items, ceil_div(rows, 8))))


def _items(tiles: int) -> int:
    """Tiles on and below the diagonal."""
    return tiles * (tiles + 1) // 2


def _sizes(features: Tensor, segments: int, capacity: int, other: tuple[int, ...]) -> tuple[int, ...]:
    b, v, c, d = features.shape
    return (b, v, c, segments, d, capacity, *features.stride(), *other, *(0,) * (3 - len(other)))


def _forward(x: Any, out: Any, labels: Tensor | None, target: Tensor | None) -> None:
    features, capacity = x.features, x.pairs.shape[0]
    require_dtype(features)
    b, _, c, _ = features.shape
    rows, tiles, width = room_for(capacity * features.shape[1], features.shape[3])
    fused = labels is not None
    program = Program(
        "sscl",
        "sscl_forward",
        {
            "X": type_of(features),
            "NORMALIZE": int(x.normalize),
            "RELEASED": int(x.released),
            "FUSED": int(fused),
            "LABEL": type_of(labels) if labels is not None else "int8_t",
        },
    )
    shared = max(TILE_BYTES, 4 * (c + 1 + max(c, THREADS) + capacity) if fused else 0)
    z = features.new_empty((rows, width))
    numbers = PLANES * rows + 3 * tiles * rows + (b * c if x.released else 0)
    scratch = features.new_empty(numbers, dtype=torch.float32)
    sizes = _sizes(features, x.class_ptr.shape[0] - 1, capacity, labels.stride() if labels is not None else ())
    launch(
        program, grid=grid_of(program, _items(tiles), rows, features.device, shared), threads=THREADS, shared=shared,
        cooperative=True,
        args=(labels, target, x.pairs, x.class_ptr, features, x.temperature, out.row_loss, out.lse, out.norm, z,
              scratch, counters(features.device), sizes),
    )  # fmt: skip


def sscl(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.sscl.Outputs`) from ``x`` (its ``Inputs``); no scores are kept.

    Raises:
        ValueError: features are float64.
    """
    _forward(x, out, None, None)


def fused(labels: Tensor, x: Any, target: Tensor, out: Any) -> None:
    """The same from ``labels [B, C]``, which are compacted into ``x.pairs``, ``x.class_ptr`` and ``target`` on the way.

    Raises:
        ValueError: features are float64; more labels than a block compacts for itself, or more classes than pairs.
    """
    b, c = labels.shape
    if x.pairs.shape[0] > FEW_LABELS or c > FEW_LABELS // 4:
        raise ValueError(f"labels: a fused launch takes at most {FEW_LABELS} pairs of {FEW_LABELS // 4} classes, "
                         f"got room for {x.pairs.shape[0]} of {c}")  # fmt: skip
    _forward(x, out, labels.view(torch.uint8) if labels.dtype == torch.bool else labels, target)


def sscl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill ``grad_features [B, V, C, D]`` and ``grad_temperature``, see :mod:`sadcl.ops.sscl`."""
    features, capacity, grad = x.features, x.pairs.shape[0], upstream.grad_row_loss
    require_dtype(features)
    rows, tiles, width = room_for(capacity * features.shape[1], features.shape[3])
    program = Program("sscl", "sscl_backward", {"X": type_of(features), "NORMALIZE": int(x.normalize)})
    z = features.new_empty((rows, width))
    scratch = features.new_empty((PLANES + tiles) * rows, dtype=torch.float32)
    weights = features.new_empty(min(rows * rows, max(WEIGHTS, TILE * rows)))
    sizes = _sizes(features, x.class_ptr.shape[0] - 1, capacity, grad.stride())
    launch(
        program, grid=grid_of(program, _items(tiles), rows, features.device), threads=THREADS, shared=TILE_BYTES,
        cooperative=True,
        args=(grad, features, x.pairs, x.class_ptr, x.temperature, saved.lse, saved.norm, out.grad_features,
              out.grad_temperature, z, scratch, weights, weights.numel(), counters(features.device), sizes),
    )  # fmt: skip
