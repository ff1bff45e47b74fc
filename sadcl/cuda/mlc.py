"""Op ``mlc`` in one cooperative launch each way, for weights that follow from the labels of a pair.

Those of mulsupcon and msc need sums over classes, dense ones are given: they are Triton's, and so are prototypes. What
the backward's blocks exchange grows with the square of the vectors, keys included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadcl import _checks
from sadcl._thresholds import least_share

from ._launch import Program, counters, launch
from ._types import type_of
from .sscl import PLANES, THREADS, TILE, TILE_BYTES, WEIGHTS, ceil_div, grid_of, require_dtype, room_for

TAKEN = {0: "all", 1: "any", 3: "jaccard", 4: "overlap", 5: "simdis"}  # as in sadcl.portable.mlc.WEIGHTINGS
_SUMS = 5  # of an anchor and a tile of columns


def takes(x: Any) -> bool:
    """Whether these kernels compute the weighting of ``x``."""
    return x.weighting in TAKEN and x.prototypes is None


def _labels(x: Any) -> tuple[Tensor, Tensor]:
    """Labels and key labels of one dtype, as the kernels read them; the images' own where there are no keys."""
    found: list[Tensor] = []
    for name, labels in (("labels", x.labels), ("key_labels", x.key_labels)):
        if labels is None:
            labels = found[0]
        if _checks.reads_values(labels):
            _checks.check_label_values(labels, name)
        found.append(labels.view(torch.uint8) if labels.dtype == torch.bool else labels)
    if found[0].dtype != found[1].dtype:
        return found[0], found[1].to(found[0].dtype if found[0].dtype.is_signed else torch.int8)
    return found[0], found[1]


def _problem(x: Any, upstream: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Labels, key labels, keys, and the sizes that both kernels are given."""
    if not takes(x):
        raise ValueError(f"weighting: backend='cuda' computes {', '.join(TAKEN.values())}; use 'triton' for the others")
    require_dtype(x.features)
    (b, v, d), (labels, key_labels) = x.features.shape, _labels(x)
    keys = None if x.keys is None else x.keys.to(x.features.dtype)
    k = 0 if keys is None else keys.shape[0]
    share = least_share(x.threshold, labels.shape[1]) if TAKEN[x.weighting] == "jaccard" else (0, 1)
    strides = (*x.features.stride(), *((0, 0) if keys is None else keys.stride()), *labels.stride(),
               *key_labels.stride(), *upstream)  # fmt: skip
    return labels, key_labels, keys, (b, v, k, d, labels.shape[1], 0 if x.include_batch else b * v, *share, *strides)


def _program(kernel: str, x: Any, labels: Tensor) -> Program:
    defines = {"X": type_of(x.features), "LABELS": type_of(labels), "WEIGHTING": x.weighting}
    return Program("mlc", kernel, {**defines, "NORMALIZE": int(x.normalize)})


def mlc(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.mlc.Outputs`) from ``x`` (its ``Inputs``).

    Raises:
        ValueError: a weighting that these kernels do not compute; float64 features; labels of no meaning, where values
            are read.
    """
    labels, key_labels, keys, sizes = _problem(x, (0, 0))
    b, v, k, d, c, first = sizes[:6]
    rows, _, width = room_for(b * v + k, d)
    row_tiles, column_tiles = ceil_div(b * v, TILE), ceil_div(b * v + k - first, TILE)
    program = _program("mlc_forward", x, labels)
    new = x.features.new_empty
    launch(
        program, grid=grid_of(program, row_tiles * column_tiles, rows, x.features.device), threads=THREADS,
        shared=TILE_BYTES, cooperative=True,
        args=(x.features, keys, labels, key_labels, x.temperature, out.row_loss, out.lse, out.norm, new((rows, width)),
              new((2, ceil_div(c, 64), b + k), dtype=torch.int64),
              new(PLANES * rows + _SUMS * column_tiles * row_tiles * TILE, dtype=torch.float32),
              counters(x.features.device), sizes),
    )  # fmt: skip


def mlc_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features, keys and temperature that are there, see :mod:`sadcl.ops.mlc`."""
    grad = upstream.grad_row_loss
    labels, key_labels, keys, sizes = _problem(x, grad.stride())
    b, v, k, d, c = sizes[:5]
    rows, tiles, width = room_for(b * v + k, d)
    program = _program("mlc_backward", x, labels)
    new = x.features.new_empty
    weights = new(min(rows * rows, max(WEIGHTS, TILE * rows)))
    of_keys = out.grad_keys
    if of_keys is not None and of_keys.dtype != x.features.dtype:
        of_keys = new(of_keys.shape)
    launch(
        program, grid=grid_of(program, tiles * (tiles + 1) // 2, rows, x.features.device), threads=THREADS,
        shared=TILE_BYTES, cooperative=True,
        args=(grad, x.features, keys, labels, key_labels, x.temperature, saved.lse, saved.norm, out.grad_features,
              of_keys, out.grad_temperature, new((rows, width)), new((2, ceil_div(c, 64), b + k), dtype=torch.int64),
              new((PLANES + tiles) * rows, dtype=torch.float32), weights, weights.numel(),
              counters(x.features.device), sizes),
    )  # fmt: skip
    if of_keys is not out.grad_keys:
        out.grad_keys.copy_(of_keys)
