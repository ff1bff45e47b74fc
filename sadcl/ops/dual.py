"""Op ``dual``: SSCL between two views and PSCL of the first, over one set of features.

What the two ops cannot do apart: the views stay where they are (two allocations of the same strides are one strided
array ``[B, 2, C, D]``), and the backward fills one buffer ``[V, B, C, D]``: PSCL writes view 0, SSCL zero-fills the
other and adds its few active rows. Apart, that is a stacked copy of both views, a second gradient of view 0, and their
sum. Floor at COCO size (B32 V2 C80 D1024, float32): view 0 read twice, the gradient written once, 42 MB.

C++ only; elsewhere :func:`sadcl.functional.dual_contrastive_loss` runs the ops ``sscl`` and ``pscl``, whose
oracles are also this op's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import without_autocast
from . import pscl, sscl
from ._library import Backward, Into, Op
from ._native import DTYPE_CODES, array, extension, native


class Inputs(NamedTuple):
    """What both losses are of, see their ops."""

    embeddings: Tensor  # [B, C, D], the first view
    bank: Tensor | None  # [B, C, D], the second
    prototypes: Tensor  # [C, D]
    pairs: Tensor  # int32 [capacity]
    class_ptr: Tensor  # int32 [C + 1]
    target: Tensor  # int8 [B, C]
    sample_temperature: Tensor  # [] in the accumulation dtype
    prototype_temperature: Tensor  # []
    released: bool
    keep: int


class Outputs(NamedTuple):
    """Both losses, then both ops' statistics."""

    row_loss: Tensor
    class_loss: Tensor
    lse: Tensor
    norm: Tensor
    kept: Tensor
    score: Tensor
    norm_x: Tensor
    norm_p: Tensor
    class_lse: Tensor


class Gradients(NamedTuple):
    """What the backward fills."""

    views: Tensor  # [V, B, C, D]
    prototypes: Tensor
    sample_temperature: Tensor
    prototype_temperature: Tensor


class _Upstream(NamedTuple):
    """What the two backward kernels take from above."""

    grad_row_loss: Tensor
    grad_class_loss: Tensor


def stacked(embeddings: Tensor, bank: Tensor | None) -> Tensor:
    """The views as a tensor ``[B, V, C, D]``."""
    if bank is None:
        return embeddings[:, None]
    with without_autocast(embeddings.device):  # float16 autocast on a CPU refuses to stack bfloat16
        return torch.stack([embeddings, bank], dim=1)


def _views(embeddings: Tensor, bank: Tensor | None) -> tuple[Any, Tensor | None]:
    """The views as one array ``[B, V, C, D]``, and the tensor it describes where that is not the two themselves."""
    distance = 0 if bank is None else bank.data_ptr() - embeddings.data_ptr()
    if bank is None or bank.stride() != embeddings.stride() or distance % embeddings.element_size() != 0:
        views = stacked(embeddings, bank)
        return array(views), views
    b, c, d = embeddings.shape
    (stride_b, stride_c, stride_d), stride_v = embeddings.stride(), distance // embeddings.element_size()
    shape, strides = (b, 2, c, d), (stride_b, stride_v, stride_c, stride_d)
    return extension().Array(embeddings.data_ptr(), DTYPE_CODES[embeddings.dtype], shape, strides), None


def _apart(x: Inputs, views: Any) -> tuple[sscl.Inputs, pscl.Inputs]:
    """The two ops' inputs."""
    return (
        sscl.Inputs(views, x.pairs, x.class_ptr, x.sample_temperature, True, x.released, x.keep),
        pscl.Inputs(x.embeddings, x.prototypes, x.target, x.prototype_temperature, x.released),
    )


def _outputs_apart(out: Outputs) -> tuple[sscl.Outputs, pscl.Outputs]:
    return (
        sscl.Outputs(out.row_loss, out.lse, out.norm, out.kept),
        pscl.Outputs(out.class_loss, out.score, out.norm_x, out.norm_p, out.class_lse),
    )


def views_of(x: Inputs) -> Tensor:
    """A stand-in for both views, of which shape, dtype and device may be asked and whether a gradient is wanted."""
    first = x.embeddings if x.bank is None or x.embeddings.requires_grad else x.bank
    return first[:, None].expand(-1, 1 if x.bank is None else 2, -1, -1)


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    of_rows, of_classes = _apart(x, views_of(x))
    row_loss, lse, norm, kept = sscl.allocate(of_rows)
    class_loss, score, norm_x, norm_p, class_lse = pscl.allocate(of_classes)
    return Outputs(row_loss, class_loss, lse, norm, kept, score, norm_x, norm_p, class_lse)


def _cpp(x: Inputs, out: Outputs) -> None:
    views, _copy = _views(x.embeddings, x.bank)
    (x_rows, x_classes), (out_rows, out_classes) = _apart(x, views), _outputs_apart(out)
    native("sscl_forward")(x_rows, out_rows)
    native("pscl_forward")(x_classes, out_classes)


def _allocate_gradients(x: Inputs, wanted: tuple[str, ...]) -> Gradients:
    return Gradients(
        views=x.embeddings.new_empty((1 if x.bank is None else 2, *x.embeddings.shape)),
        prototypes=x.prototypes.new_empty(x.prototypes.shape),
        sample_temperature=torch.empty_like(x.sample_temperature),
        prototype_temperature=torch.empty_like(x.prototype_temperature),
    )


def _backward_cpp(upstream: Any, x: Inputs, saved: Outputs, out: Gradients) -> None:
    views, _copy = _views(x.embeddings, x.bank)
    (x_rows, x_classes), (rows, classes) = _apart(x, views), _outputs_apart(saved)
    of_classes = upstream.grad_class_loss
    if of_classes is None:
        of_classes = upstream.grad_row_loss.new_zeros(x.prototypes.shape[0])
    given = _Upstream(upstream.grad_row_loss, of_classes)
    native("pscl_backward")(
        given, x_classes, classes,
        grad_features=out.views[0], grad_prototypes=out.prototypes, grad_temperature=out.prototype_temperature,
    )  # fmt: skip
    native("sscl_backward")(
        given, x_rows, rows,
        grad_features=out.views.transpose(0, 1), grad_temperature=out.sample_temperature,
        add_to_first=True,
    )  # fmt: skip


def _spread(grads: Gradients, x: Inputs) -> dict[str, Tensor | None]:
    return {
        "grad_embeddings": grads.views[0],
        "grad_bank": None if x.bank is None else grads.views[1],
        "grad_prototypes": grads.prototypes,
        "grad_sample_temperature": grads.sample_temperature,
        "grad_prototype_temperature": grads.prototype_temperature,
    }


dual = Op(
    "dual",
    Inputs,
    Outputs,
    allocate,
    {"cpp": Into(_cpp)},
    Backward(
        gradients=("embeddings", "bank", "prototypes", "sample_temperature", "prototype_temperature"),
        implementations={"cpp": Into(_backward_cpp)},
        needs=(*(name for name in Inputs._fields if name != "keep"), *Outputs._fields[2:]),
        fills=Gradients,
        allocate=_allocate_gradients,
        spread=_spread,
    ),
    results=2,
)
