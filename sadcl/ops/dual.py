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
    mean: bool  # the means over active rows and over positives, taken inside; not of the released formulation
    keep: int


class Outputs(NamedTuple):
    """Both losses, then both ops' statistics."""

    sample: Tensor  # [B, V, C], or [] the mean
    prototype: Tensor  # [C], or []
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


def _apart(x: Inputs, views: Any) -> tuple[Any, Any]:
    """The two ops' inputs, or those of their means."""
    rows, classes = (x.pairs, x.class_ptr, x.sample_temperature), (x.embeddings, x.prototypes, x.target)
    if x.mean:
        return sscl.MeanInputs(views, *rows, x.keep), pscl.MeanInputs(*classes, x.class_ptr, x.prototype_temperature)
    return (
        sscl.Inputs(views, *rows, True, x.released, x.keep),
        pscl.Inputs(*classes, x.prototype_temperature, x.released),
    )


def _outputs_apart(x: Inputs, out: Outputs) -> tuple[Any, Any]:
    of_rows, of_classes = (sscl.Mean, pscl.Mean) if x.mean else (sscl.Outputs, pscl.Outputs)
    return (
        of_rows(out.sample, out.lse, out.norm, out.kept),
        of_classes(out.prototype, out.score, out.norm_x, out.norm_p, out.class_lse),
    )


def views_of(x: Inputs) -> Tensor:
    """A stand-in for both views, of which shape, dtype and device may be asked and whether a gradient is wanted."""
    first = x.embeddings if x.bank is None or x.embeddings.requires_grad else x.bank
    return first[:, None].expand(-1, 1 if x.bank is None else 2, -1, -1)


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    of_rows, of_classes = _apart(x, views_of(x))
    sample, *rows = (sscl.allocate_mean if x.mean else sscl.allocate)(of_rows)
    prototype, *classes = (pscl.allocate_mean if x.mean else pscl.allocate)(of_classes)
    return Outputs(sample, prototype, *rows, *classes)


def _cpp(x: Inputs, out: Outputs) -> None:
    views, _copy = _views(x.embeddings, x.bank)
    (x_rows, x_classes), (out_rows, out_classes) = _apart(x, views), _outputs_apart(x, out)
    what = "mean_forward" if x.mean else "forward"
    native(f"sscl_{what}")(x_rows, out_rows)
    native(f"pscl_{what}")(x_classes, out_classes)


def _allocate_gradients(x: Inputs, wanted: tuple[str, ...]) -> Gradients:
    return Gradients(
        views=x.embeddings.new_empty((1 if x.bank is None else 2, *x.embeddings.shape)),
        prototypes=x.prototypes.new_empty(x.prototypes.shape),
        sample_temperature=torch.empty_like(x.sample_temperature),
        prototype_temperature=torch.empty_like(x.prototype_temperature),
    )


def _backward_cpp(upstream: Any, x: Inputs, saved: Outputs, out: Gradients) -> None:
    views, _copy = _views(x.embeddings, x.bank)
    (x_rows, x_classes), (rows, classes) = _apart(x, views), _outputs_apart(x, saved)
    of_rows, of_classes = upstream
    if of_classes is None:
        of_classes = of_rows.new_zeros(() if x.mean else x.prototypes.shape[0])
    names = ("mean_backward", "grad_mean", "grad_mean") if x.mean else ("backward", "grad_row_loss", "grad_class_loss")
    native(f"pscl_{names[0]}")(
        x_classes, classes, **{names[2]: of_classes},
        grad_features=out.views[0], grad_prototypes=out.prototypes, grad_temperature=out.prototype_temperature,
    )  # fmt: skip
    native(f"sscl_{names[0]}")(
        x_rows, rows, **{names[1]: of_rows},
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
