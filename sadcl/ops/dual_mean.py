"""Op ``dual_mean``: the means of SSCL and PSCL of one batch from its labels, for a GPU where launches are what costs.

Forward, three launches: a copy of both views side by side; compaction and SSCL; PSCL, whose last block adds up both
losses. Backward, three: the upstream gradient over the rows, SSCL, PSCL, which adds to SSCL's gradient of the first
view. CUDA C++ only, for the paper's formulation without weights; elsewhere ``dual_contrastive_loss`` runs the ops,
whose oracles are also this op's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, without_autocast
from . import compact, pscl, sscl
from ._library import Backward, Into, Op
from ._native import cuda_kernel


class Inputs(NamedTuple):
    """What both losses are of."""

    embeddings: Tensor  # [B, C, D], the first view; not float64
    bank: Tensor  # [B, C, D], the second
    prototypes: Tensor  # [C, D]
    labels: Tensor  # [B, C]
    sample_temperature: Tensor  # [] in the accumulation dtype
    prototype_temperature: Tensor  # []


class Outputs(NamedTuple):
    """Both means, then what the backward reads, then the losses that were added up."""

    sample: Tensor  # []
    prototype: Tensor  # []
    over_rows: Tensor  # [], one over the number of rows
    views: Tensor  # [B, 2, C, D]
    pairs: Tensor
    class_ptr: Tensor
    target: Tensor
    lse: Tensor
    norm: Tensor
    score: Tensor
    norm_x: Tensor
    norm_p: Tensor
    class_lse: Tensor
    row_loss: Tensor
    class_loss: Tensor


class Gradients(NamedTuple):
    """What the backward fills."""

    views: Tensor  # [B, 2, C, D]
    prototypes: Tensor
    sample_temperature: Tensor
    prototype_temperature: Tensor


class _OfRows(NamedTuple):
    grad_row_loss: Tensor


class _ToRows(NamedTuple):
    grad_features: Tensor
    grad_temperature: Tensor


class _ToClasses(NamedTuple):
    grad_features: Tensor
    grad_prototypes: Tensor
    grad_temperature: Tensor


def serves(embeddings: Tensor) -> bool:
    """Whether these are what a block compacts for itself. A graph that is compiled knows no batch's size."""
    if torch.compiler.is_compiling() or embeddings.dtype == torch.float64:
        return False
    b, c, _ = embeddings.shape
    return b * c <= 1 << 13 and c <= 1 << 11


def _apart(x: Inputs, out: Any) -> tuple[sscl.Inputs, pscl.Inputs]:
    """The two ops' inputs."""
    return (
        sscl.Inputs(out.views, out.pairs, out.class_ptr, x.sample_temperature, True, False, 0),
        pscl.Inputs(x.embeddings, x.prototypes, out.target, x.prototype_temperature, False),
    )


def _outputs_apart(out: Outputs) -> tuple[sscl.Outputs, pscl.Outputs]:
    none = out.over_rows.new_empty(0)
    return (
        sscl.Outputs(out.row_loss, out.lse, out.norm, none),
        pscl.Outputs(out.class_loss, out.score, out.norm_x, out.norm_p, out.class_lse),
    )


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    b, c, d = x.embeddings.shape
    active = compact.allocate(compact.Inputs(x.labels, None))
    views = x.embeddings.new_empty((b, 2, c, d))
    rows = sscl.allocate(sscl.Inputs(views, active.pairs, active.class_ptr, x.sample_temperature, True, False, 0))
    of = pscl.allocate(pscl.Inputs(x.embeddings, x.prototypes, active.target, x.prototype_temperature, False))
    sample, prototype, over_rows = (
        x.embeddings.new_empty((), dtype=accumulation_dtype(x.embeddings.dtype)) for _ in range(3)
    )
    return Outputs(
        sample, prototype, over_rows, views, *active, rows.lse, rows.norm, of.score, of.norm_x, of.norm_p, of.lse,
        rows.row_loss, of.class_loss,
    )  # fmt: skip


def _cuda(x: Inputs, out: Outputs) -> None:
    if _checks.reads_values(x.labels):
        _checks.check_label_values(x.labels)
    with without_autocast(x.embeddings.device):
        torch.stack([x.embeddings, x.bank], dim=1, out=out.views)
    (x_rows, x_classes), (out_rows, out_classes) = _apart(x, out), _outputs_apart(out)
    _FUSED(x.labels, x_rows, out.target, out_rows)
    _MEAN(x_classes, out_classes, out.row_loss, out.class_ptr, (out.sample, out.prototype, out.over_rows))


def _allocate_gradients(x: Inputs, wanted: tuple[str, ...]) -> Gradients:
    b, c, d = x.embeddings.shape
    return Gradients(
        views=x.embeddings.new_empty((b, 2, c, d)),
        prototypes=x.prototypes.new_empty(x.prototypes.shape),
        sample_temperature=torch.empty_like(x.sample_temperature),
        prototype_temperature=torch.empty_like(x.prototype_temperature),
    )


def _backward_cuda(upstream: Any, x: Inputs, saved: Outputs, out: Gradients) -> None:
    (x_rows, x_classes), (rows, classes) = _apart(x, saved), _outputs_apart(saved)
    b, c, _ = x.embeddings.shape
    of_rows = (upstream.grad_sample * saved.over_rows).expand(b, 2, c)
    _ROWS_BACKWARD(_OfRows(of_rows), x_rows, rows, _ToRows(out.views, out.sample_temperature))
    to = _ToClasses(out.views[:, 0], out.prototypes, out.prototype_temperature)
    _MEAN_BACKWARD(upstream.grad_prototype, x_classes, classes, to, saved.class_ptr)


def _spread(grads: Gradients, x: Inputs) -> dict[str, Tensor | None]:
    return {
        "grad_embeddings": grads.views[:, 0],
        "grad_bank": grads.views[:, 1],
        "grad_prototypes": grads.prototypes,
        "grad_sample_temperature": grads.sample_temperature,
        "grad_prototype_temperature": grads.prototype_temperature,
    }


_FUSED, _ROWS_BACKWARD = cuda_kernel("sscl", "fused"), cuda_kernel("sscl", "sscl_backward")
_MEAN, _MEAN_BACKWARD = cuda_kernel("pscl", "pscl_mean"), cuda_kernel("pscl", "pscl_mean_backward")
dual_mean = Op(
    "dual_mean",
    Inputs,
    Outputs,
    allocate,
    {"cuda": Into(_cuda)},
    Backward(
        gradients=("embeddings", "bank", "prototypes", "sample_temperature", "prototype_temperature"),
        implementations={"cuda": Into(_backward_cuda)},
        needs=(*(name for name in Inputs._fields if name not in ("bank", "labels")), *Outputs._fields[2:-2]),
        fills=Gradients,
        allocate=_allocate_gradients,
        spread=_spread,
    ),
    results=2,
)
