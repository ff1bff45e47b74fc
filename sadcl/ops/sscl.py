"""Op ``sscl``: batched supervised contrastive loss over compacted rows.

Forward gives the loss of every anchor and the row statistics that the backward needs (log-sum-exp and norm: two float32
and a float64 per row, never a matrix, but for the scores that a CPU keeps). A log-sum-exp is kept as its pivot and the
rest, which is +inf for an anchor without a positive: as one float32 number it loses what the softmax hangs on, where
scores are large. Backward takes one upstream number per anchor, so reductions, sample weights, class weights and the
released formulation's anchor test are plain arithmetic on ``[B, V, C]`` outside.

Rows are in the order of the pairs: ``i = p * V + v`` is feature row ``(b, v, c)`` with ``pairs[p] = b * C + c``.
Oracle: :func:`sadcl.reference.sscl.sscl`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import backends
from .._dtypes import accumulation_dtype, norm_dtype
from ..portable import sscl as portable
from ._library import Backward, Into, Op
from ._native import cuda_kernel, extension, native, triton_kernel
from ._transforms import watched


class Inputs(NamedTuple):
    """What the loss is of."""

    features: Tensor  # [B, V, C, D] of any strides
    pairs: Tensor  # int32 [capacity], see sadcl.ops.compact.Active
    class_ptr: Tensor  # int32 [K + 1]: positives of a row are the other rows of its segment; K need not be C
    temperature: Tensor  # [] in the accumulation dtype
    normalize: bool  # use x / |x|; otherwise x as it is
    released: bool  # the released code's value and normaliser
    keep: int  # scores to keep for the backward, see scores_to_keep
    rounded: bool = False  # whether bfloat16 products of the gradient, where the processor has them, may round weights


class Outputs(NamedTuple):
    """The loss, and what the backward reads."""

    row_loss: Tensor  # accumulation dtype [B, V, C], 0 where inactive
    # accumulation dtype [2, capacity * V]: pivot (the largest z_i.z_j, or 0), log sum e^(s_ij - pivot / T); Triton's
    # pivot is over T already, and in base 2
    lse: Tensor
    norm: Tensor  # norm dtype [capacity * V]
    kept: Tensor  # accumulation dtype [keep]


# A traced shape must not depend on the labels: under a compiler no more than what is kept of every small problem.
_FEW_SCORES = extension().SSCL_FEW_SCORES if backends()["cpp"].available else 0


def scores_to_keep(
    features: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    temperature: Tensor,
    backend: str,
    released: bool = False,
    mean: bool = False,
) -> int:
    """How many scores the forward keeps for the backward (torch's operators: what it makes of them): none, unless one
    is coming."""
    if backend not in ("cpp", "torch") or not torch.is_grad_enabled():
        return 0
    if not (features.requires_grad or temperature.requires_grad):
        return 0
    v, d = features.shape[1], features.shape[3]
    if backend == "torch":
        if released or watched(class_ptr) or class_ptr.is_meta:
            return 0
        n = v * int(class_ptr[-1])
        return portable.gradient_to_keep(n, features, temperature.requires_grad) if mean else portable.scores_to_keep(n)
    most = (pairs.shape[0] * v) ** 2
    if watched(class_ptr) or class_ptr.is_meta:
        # jit.trace would bake the number in; a comparison would make a graph for few rows and one for many.
        few: Any = 0 if torch.jit.is_tracing() else torch.sym_min(most, _FEW_SCORES)
        return few
    if most <= _FEW_SCORES:
        return most
    return extension().sscl_keep(v * int(class_ptr[-1]), d)


def size_of(features: Tensor, rows: int) -> tuple[int, ...]:
    """What resolve() is told of a problem with room for ``rows``; nothing where the CUDA kernels cannot take it."""
    return () if features.dtype == torch.float64 else (rows,)


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    features = x.features
    b, v, c, _ = features.shape
    dtype, rows = accumulation_dtype(features.dtype), x.pairs.shape[0] * v
    return Outputs(
        row_loss=features.new_empty((b, v, c), dtype=dtype),
        lse=features.new_empty((2, rows), dtype=dtype),
        norm=features.new_empty(rows, dtype=norm_dtype(features.device)),
        kept=features.new_empty(x.keep, dtype=dtype),
    )


sscl = Op(
    "sscl",
    Inputs,
    Outputs,
    allocate,
    {
        "cpp": Into(native("sscl_forward")),
        "triton": Into(triton_kernel("sscl", "sscl")),
        "cuda": Into(cuda_kernel("sscl", "sscl")),
        "torch": portable.forward,
    },
    Backward(
        gradients=("features", "temperature"),
        implementations={
            "cpp": Into(native("sscl_backward")),
            "triton": Into(triton_kernel("sscl_backward", "sscl_backward")),
            "cuda": Into(cuda_kernel("sscl", "sscl_backward")),
            "torch": portable.backward,
        },
        needs=(*Inputs._fields[:6], "rounded", "lse", "norm", "kept"),
    ),
)


class MeanInputs(NamedTuple):
    """What the mean over the active rows is of; fields as those of :class:`Inputs`."""

    features: Tensor
    pairs: Tensor
    class_ptr: Tensor
    temperature: Tensor
    keep: int
    rounded: bool = False


class Mean(NamedTuple):
    """The mean, and what the backward reads."""

    mean: Tensor  # accumulation dtype []
    lse: Tensor
    norm: Tensor
    kept: Tensor


def allocate_mean(x: MeanInputs) -> Mean:
    """Uninitialised outputs."""
    rows = x.pairs.shape[0] * x.features.shape[1]
    acc = accumulation_dtype(x.features.dtype)
    return Mean(
        mean=x.features.new_empty((), dtype=acc),
        lse=x.features.new_empty((2, rows), dtype=acc),
        norm=x.features.new_empty(rows, dtype=norm_dtype(x.features.device)),
        kept=x.features.new_empty(x.keep, dtype=acc),
    )


class MeanGradients(NamedTuple):
    """Of the mean."""

    grad_features: Tensor
    grad_temperature: Tensor | None


def _allocate_gradients(x: MeanInputs, wanted: tuple[str, ...]) -> MeanGradients:
    turning = x.temperature.new_empty(()) if "temperature" in wanted else None
    return MeanGradients(x.features.new_empty(x.features.shape), turning)


# The usual call in one crossing each way: without the sum, its gradient and what autograd keeps of both.
sscl_mean = Op(
    "sscl_mean",
    MeanInputs,
    Mean,
    allocate_mean,
    {"cpp": Into(native("sscl_mean_forward")), "torch": portable.forward_mean},
    Backward(
        gradients=("features", "temperature"),
        implementations={"cpp": Into(native("sscl_mean_backward")), "torch": portable.backward_mean},
        needs=("features", "pairs", "class_ptr", "temperature", "rounded", "lse", "norm", "kept"),
        fills=MeanGradients,
        allocate=_allocate_gradients,
    ),
)
