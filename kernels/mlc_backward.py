"""Op ``mlc``, backward: what each vector receives as anchor and as column, in one sweep of :mod:`.sscl_backward`.

With m the upstream gradients, ``G_ij = m_i (lam_i b_j e^(s_ij - lse_i) - W_ij)`` moves anchor i by ``sum_j G_ij z_j /
tau`` and column j by ``sum_i G_ij z_i / tau``. A vector that is both takes ``G_ij + G_ji`` from a tile; keys and
prototypes have a launch of their own over the anchors; no atomics, nothing N x N.

``dL/dtau = -1/tau sum_ij G_ij s_ij``: half of ``z . g`` over all vectors where the rows are columns, else the anchors'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadcl._dtypes import without_autocast

from . import _tiles, _tune
from ._launch import ceil_div, launch, part_of, require_dtype
from ._rows import Rows, stage_vectors
from .mlc import (
    _BLOCK_ROWS,
    Classes,
    _moves_kernel,
    given_of,
    readable,
    sweep_pairs,
    through_classes,
    vectors_of,
)
from .mlc_pairs import MULSUPCON, Pairs, make_pairs, policy_of, table_of
from .sscl_backward import sweep_gradient, temperature_gradient


def mlc_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features, keys, prototypes and temperature that are there, see :mod:`sadcl.ops.mlc`."""
    part = part_of(x.features.device)
    require_dtype(part, x.features.dtype)
    acc = x.temperature.dtype
    norm = _seen(x, saved)
    table = stage_vectors(vectors_of(x), norm, x.normalize, known=True)
    with without_autocast(x.features.device):
        classes = through_classes(x, norm, acc) if x.weighting == MULSUPCON.value else None
        pairs = make_pairs(x, readable(x.labels, "labels"), readable(x.key_labels, "key_labels"), acc)
        if classes is not None:
            pairs = pairs._replace(apart=_apart(x, classes, upstream.grad_row_loss, saved.lse))
        given = given_of(x, pairs, classes)
    precision = _tiles.precision(x.features.dtype, part)
    kind = _tiles.kind_of(x.features.dtype, precision)
    peak = _moves(upstream.grad_row_loss, x, saved, table, pairs, given, _tiles.candidates(table_of(x), part, kind)[0])
    radial, unused = table.stat.new_zeros((2, table.capacity))
    launches = _launches(x, out, pairs)

    def run(tile: _tiles.Tile) -> None:
        for ranges, grad, policy in launches:
            once = x.include_batch or ranges.row_begin == 0  # else the anchors count a pair already
            sweep_gradient(tile, table, ranges, (peak, 1), x.temperature,
                           (grad, radial if once else unused), x.normalize, precision, policy)  # fmt: skip

    run(_tune.choose(table_of(x), part, kind, (pairs.anchors, table.capacity, table.width), run))
    if out.grad_temperature is not None:
        temperature_gradient(radial, table, x.temperature, out.grad_temperature, 0.5 if x.include_batch else 1.0)


def _seen(x: Any, saved: Any) -> Tensor:
    """Norms, 0 of vectors that no loss saw: they may hold anything, and receive 0."""
    active = ~torch.isposinf(saved.lse)
    seen = active.any().expand(saved.norm.shape[0])
    if not x.include_batch:
        seen = torch.cat([active, seen[active.shape[0] :]])
    return torch.where(seen, saved.norm, 0.0)


def _apart(x: Any, classes: Classes, upstream: Tensor, lse: Tensor) -> Tensor:
    """Mulsupcon's gradient without the softmax: what its weights pull, of anchors and of columns."""
    b, v, d = x.features.shape
    unit, has, key_has, share, pulls, _ = classes
    m = torch.where(torch.isposinf(lse), 0.0, upstream.reshape(-1).to(unit.dtype))[:, None]
    anchors, weighted = unit[: b * v], m * unit[: b * v]
    of_classes = share.t() @ weighted.reshape(b, v, d).sum(dim=1)
    apart = [-m * pulls]
    if x.include_batch:
        of_rows = (has @ of_classes).repeat_interleave(v, 0)
        apart[0] = apart[0] - of_rows + share.sum(dim=1).repeat_interleave(v)[:, None] * m * anchors
    if key_has is not None:
        apart.append(-key_has @ of_classes)
    return torch.cat(apart) / x.temperature


def _moves(
    upstream: Tensor, x: Any, saved: Any, table: Rows, pairs: Pairs, given: Tensor | None, tile: _tiles.Tile
) -> Tensor:
    """Count the pairs again (labels alone) and leave every vector's push, high and pull; returns the largest push.

    As one number: a count of blocks that follows the batch would be compiled again and again.
    """
    precision = _tiles.precision(x.features.dtype, part_of(x.features.device))
    partial, constants = None, {"SLOTS": 1, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    if given is None:
        partial, constants = sweep_pairs(x, table, pairs, tile, precision, scores=False)
    blocks = ceil_div(table.capacity, _BLOCK_ROWS)
    peaks = table.stat.new_empty(blocks)
    launch(_moves_kernel, blocks,
           (table, partial, given, pairs, upstream, saved.lse, peaks, upstream.stride()),
           BLOCK_R=_BLOCK_ROWS, POLICY=policy_of(x), num_warps=2, **constants)  # fmt: skip
    return peaks.amax(dim=0, keepdim=True)


def _launches(x: Any, out: Any, pairs: Pairs) -> list[tuple[Pairs, Tensor, tuple[Any, ...]]]:
    """Rows and columns of each launch, where its gradient goes, its policy.

    With rows as columns, the temperature's gradient needs the keys' and prototypes' ``z . g`` too.
    """
    of_tau = out.grad_temperature is not None
    common = policy_of(x)[:-2]
    found = []
    if out.grad_features is not None or of_tau:
        grad = x.features.new_empty(x.features.shape) if out.grad_features is None else out.grad_features
        found.append((pairs, grad, (*common, True, x.include_batch)))
    begin = pairs.anchors
    for vectors, grad in ((x.keys, out.grad_keys), (x.prototypes, out.grad_prototypes)):
        if vectors is None:
            continue
        end = begin + vectors.shape[0]
        if (grad is not None or (of_tau and x.include_batch)) and end > begin:
            grad = vectors.new_empty(vectors.shape) if grad is None else grad
            ranges = pairs._replace(row_begin=begin, row_end=end, col_begin=0, col_end=pairs.anchors)
            found.append((ranges, grad, (*common, False, True)))
        begin = end
    return found
