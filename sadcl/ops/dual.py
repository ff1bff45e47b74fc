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

from . import pscl, sscl
from ._library import (
    DTYPE_CODES,
    array,
    call,
    extension,
    implemented,
    refuse_second_derivative,
    register,
    register_autograd,
)

Outputs = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """What both losses work on: ``[B, C, D]`` views (the second may be missing), prototypes ``[C, D]``, labels."""

    embeddings: Tensor
    bank: Tensor | None
    prototypes: Tensor
    pairs: Tensor
    class_ptr: Tensor
    target: Tensor


_INPUTS = "Tensor embeddings, Tensor? bank, Tensor prototypes, Tensor pairs, Tensor class_ptr, Tensor target"
_TEMPERATURES = "Tensor sample_temperature, Tensor prototype_temperature"


def stacked(embeddings: Tensor, bank: Tensor | None) -> Tensor:
    """The views as a tensor ``[B, V, C, D]``."""
    if bank is None:
        return embeddings[:, None]
    with torch.autocast(embeddings.device.type, enabled=False):  # float16 autocast on a CPU refuses to stack bfloat16
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


def _allocate(embeddings: Tensor, bank: Tensor | None, prototypes: Tensor, pairs: Tensor, keep: int) -> Outputs:
    """Uninitialised: sscl's (row_loss, lse, norm, tile) and pscl's (class_loss, score, norm_x, norm_p, class_lse)."""
    b, c, d = embeddings.shape
    rows = embeddings.as_strided((b, 1 if bank is None else 2, c, d), (0, 0, 0, 0))  # its shape and dtype are asked for
    return *sscl._allocate(rows, pairs, keep), *pscl._allocate(embeddings, prototypes)


def _fake(
    embeddings: Tensor,
    bank: Tensor | None,
    prototypes: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    target: Tensor,
    sample_temperature: Tensor,
    prototype_temperature: Tensor,
    released: bool,
    keep: int,
    backend: str,
) -> Outputs:
    return _allocate(embeddings, bank, prototypes, pairs, keep)


def _cpp(
    embeddings: Tensor,
    bank: Tensor | None,
    prototypes: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    target: Tensor,
    sample_temperature: Tensor,
    prototype_temperature: Tensor,
    released: bool,
    keep: int,
) -> Outputs:
    outputs = _allocate(embeddings, bank, prototypes, pairs, keep)
    arrays, threads = [array(output) for output in outputs], torch.get_num_threads()
    views, _copy = _views(embeddings, bank)
    extension().sscl_forward(
        views, array(pairs), array(class_ptr), sample_temperature.item(), True, released, *arrays[:4], threads
    )
    extension().pscl_forward(
        array(embeddings),
        array(prototypes),
        array(target),
        prototype_temperature.item(),
        released,
        *arrays[4:],
        threads,
    )
    return outputs


def _backward_fake(
    grad_rows: Tensor,
    grad_class: Tensor,
    embeddings: Tensor,
    bank: Tensor | None,
    prototypes: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    target: Tensor,
    sample_temperature: Tensor,
    prototype_temperature: Tensor,
    saved: list[Tensor],
    released: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        embeddings.new_empty((1 if bank is None else 2, *embeddings.shape)),
        prototypes.new_empty(prototypes.shape),
        torch.empty_like(sample_temperature),
        torch.empty_like(prototype_temperature),
    )


def _backward_cpp(
    grad_rows: Tensor,
    grad_class: Tensor,
    embeddings: Tensor,
    bank: Tensor | None,
    prototypes: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    target: Tensor,
    sample_temperature: Tensor,
    prototype_temperature: Tensor,
    saved: list[Tensor],
    released: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_views = embeddings.new_empty((1 if bank is None else 2, *embeddings.shape))
    grad_prototypes = prototypes.new_empty(prototypes.shape)
    statistics, threads = [array(x) for x in saved], torch.get_num_threads()
    views, _copy = _views(embeddings, bank)
    grad_prototype_temperature = extension().pscl_backward(
        array(grad_class), array(embeddings), array(prototypes), array(target), prototype_temperature.item(),
        *statistics[3:], released, array(grad_views[0]), array(grad_prototypes), threads,
    )  # fmt: skip
    grad_sample_temperature = extension().sscl_backward(
        array(grad_rows), views, array(pairs), array(class_ptr), sample_temperature.item(),
        *statistics[:3], True, array(grad_views.transpose(0, 1)), True, threads,
    )  # fmt: skip
    return (
        grad_views,
        grad_prototypes,
        torch.full_like(sample_temperature, grad_sample_temperature),
        torch.full_like(prototype_temperature, grad_prototype_temperature),
    )


_IMPLEMENTATIONS = {"cpp": _cpp}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)
ALSO_COMPOSED = sscl.IMPLEMENTED  # what the loss runs on: here, or as the two ops

register(
    "dual",
    f"({_INPUTS}, {_TEMPERATURES}, bool released, int keep, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _IMPLEMENTATIONS,
    _fake,
)
register(
    "dual_backward",
    f"(Tensor grad_rows, Tensor grad_class, {_INPUTS}, {_TEMPERATURES}, Tensor[] saved, bool released, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    {"cpp": _backward_cpp},
    _backward_fake,
)
refuse_second_derivative("dual_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, released, _, backend = inputs
    statistics = (*output[1:4], *output[5:])
    ctx.save_for_backward(*tensors, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.losses = [(output[i].shape, output[i].dtype) for i in (0, 4)]
    ctx.released, ctx.backend = released, backend


def _autograd(
    ctx: Any, grad_rows: Tensor | None, _lse: Any, _norm: Any, _tile: Any, grad_class: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    upstream = [
        tensors[0].new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip((grad_rows, grad_class), ctx.losses, strict=True)
    ]
    grad_views, grad_prototypes, grad_sample_temperature, grad_prototype_temperature = call(
        "dual_backward", *upstream, *tensors[:8], list(tensors[8:]), ctx.released, ctx.backend
    )
    grad_bank = grad_views[1] if tensors[1] is not None else None
    return (
        grad_views[0], grad_bank, grad_prototypes, None, None, None,
        grad_sample_temperature, grad_prototype_temperature, None, None, None,
    )  # fmt: skip


register_autograd("dual", _autograd, _setup_context)


def dual(
    inputs: Inputs, sample_temperature: Tensor, prototype_temperature: Tensor, released: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss of every anchor ``[B, V, C]`` and of every class ``[C]``, in the accumulation dtype.

    Args:
        inputs: views, prototypes and compacted labels.
        sample_temperature: 0-d tensor of the accumulation dtype.
        prototype_temperature: the same.
        released: the released code's values.
        backend: a name out of :data:`IMPLEMENTED`.
    """
    differentiable = (inputs.embeddings, inputs.bank, sample_temperature)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    rows = inputs.embeddings[:, None].expand(-1, 1 if inputs.bank is None else 2, -1, -1)  # a shape
    keep = sscl.scores_to_keep(rows, inputs.pairs, inputs.class_ptr, backend) if save else 0
    outputs = call("dual", *inputs, sample_temperature, prototype_temperature, released, keep, backend)
    return outputs[0], outputs[4]
