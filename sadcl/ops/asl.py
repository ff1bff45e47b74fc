"""Op ``asl``: asymmetric loss, value and derivative in one sweep; of every element, or summed over classes.

Everything is in log-sigmoid form and float32 (float64 for float64 logits), so logits of +-1e4 stay finite in any dtype.
The derivative by soft labels and by class weights is plain torch on every backend: it is rarely asked for.
Oracle: :func:`sadcl.reference.asl.asl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_soft_labels
from .._dtypes import accumulation_dtype
from ..portable import asl as portable
from ._library import Backward, Into, Op
from ._native import cuda_kernel, native, triton_kernel


class Inputs(NamedTuple):
    """What the loss is of; the constants are those of the oracle."""

    logits: Tensor  # [B, C]
    labels: Tensor  # [B, C] in [0, 1], or -1: ignored
    class_weight: Tensor | None  # [C] in the accumulation dtype
    gamma_neg: float
    gamma_pos: float
    clip: float
    eps: float
    detach_focal_weight: bool
    sum_classes: bool  # one number an image
    save: bool  # whether the derivative by the logits will be asked for


class Outputs(NamedTuple):
    """The loss, and its derivative by the logits."""

    loss: Tensor  # accumulation dtype [B, C] or [B]
    slope: Tensor  # accumulation dtype [B, C], or [0, 0] without `save`


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    acc = accumulation_dtype(x.logits.dtype)
    return Outputs(
        loss=x.logits.new_empty(x.logits.shape[:1] if x.sum_classes else x.logits.shape, dtype=acc),
        slope=x.logits.new_empty(x.logits.shape if x.save else (0, 0), dtype=acc),
    )


def _cpp(x: Inputs, out: Outputs) -> None:
    if x.class_weight is not None:
        x = x._replace(class_weight=x.class_weight.to(out.loss.dtype).contiguous())
    if not _FORWARD(x, out):
        check_soft_labels(x.labels)


def _with_rare_gradients(of_logits: Callable[..., None]) -> Into:
    """``of_logits``, and the other derivatives where they are wanted."""

    def run(upstream: Any, x: Any, saved: Any, out: Any) -> None:
        if out.grad_logits is not None:
            of_logits(upstream, x, saved, out)
        if out.grad_labels is not None or out.grad_class_weight is not None:
            portable.rare_gradients(upstream, x, out)

    return Into(run)


_FORWARD = native("asl_forward")
asl = Op(
    "asl",
    Inputs,
    Outputs,
    allocate,
    {
        "cpp": Into(_cpp),
        "triton": Into(triton_kernel("asl", "asl")),
        "cuda": Into(cuda_kernel("asl", "asl")),
        "torch": portable.forward,
    },
    Backward(
        gradients=("logits", "labels", "class_weight"),
        implementations={
            "cpp": _with_rare_gradients(native("asl_backward")),
            "triton": _with_rare_gradients(triton_kernel("asl", "asl_backward")),
            "cuda": _with_rare_gradients(cuda_kernel("asl", "asl_backward")),
            "torch": _with_rare_gradients(portable.backward),
        },
        partial=True,
    ),
)


def _allocate_total(x: Inputs) -> Outputs:
    out = allocate(x)
    return out._replace(loss=out.loss.new_empty(()))


# The loss of all elements in one number and one launch, for few of them on a GPU.
asl_total = Op(
    "asl_total",
    Inputs,
    Outputs,
    _allocate_total,
    {"cuda": Into(cuda_kernel("asl", "asl"))},
    Backward(
        gradients=("logits", "labels", "class_weight"),
        implementations={"cuda": _with_rare_gradients(cuda_kernel("asl", "asl_backward"))},
        partial=True,
    ),
)


def are_few(b: int, c: int) -> bool:
    """Whether one block may take all elements: 8 a thread. A graph that is compiled knows no batch's size."""
    return not torch.compiler.is_compiling() and b * c <= 1 << 13
