"""Ops ``pscl`` and ``pscl_mean``: prototype-to-sample contrastive loss, one number per class, or its mean.

Forward keeps the ``[B, C]`` scores, the norms and two log-sum-exps per class; backward needs no product of features
with prototypes again. These are float64: a gradient row hangs on one difference of two softmax weights, and a float32
score of 1 / 0.07 is already off by 5e-7. Oracle: :func:`sadcl.reference.pscl.pscl`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._dtypes import accumulation_dtype, norm_dtype
from ..portable import pscl as portable
from ._library import Backward, Into, Op
from ._native import cuda_kernel, native, triton_kernel


class Inputs(NamedTuple):
    """What the loss is of."""

    features: Tensor  # [B, C, D] of any strides
    prototypes: Tensor  # [C, D]
    target: Tensor  # int8 [B, C], see sadcl.ops.compact.Active
    temperature: Tensor  # [] in the accumulation dtype
    released: bool  # add the released code's term for classes without a positive


class Outputs(NamedTuple):
    """The loss, and what the backward reads."""

    class_loss: Tensor  # accumulation dtype [C]
    score: Tensor  # norm dtype [B, C]
    norm_x: Tensor  # norm dtype [B, C]
    norm_p: Tensor  # norm dtype [C]
    lse: Tensor  # norm dtype [2, C]: over all images, over the positive ones


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    return Outputs(
        x.features.new_empty(x.features.shape[1], dtype=accumulation_dtype(x.features.dtype)), *_statistics(x)
    )


def _statistics(x: Inputs | MeanInputs) -> tuple[Tensor, ...]:
    """What the backward reads, uninitialised."""
    b, c, _ = x.features.shape
    wide = norm_dtype(x.features.device)
    return tuple(x.features.new_empty(shape, dtype=wide) for shape in ((b, c), (b, c), (c,), (2, c)))


pscl = Op(
    "pscl",
    Inputs,
    Outputs,
    allocate,
    {
        "cpp": Into(native("pscl_forward")),
        "triton": Into(triton_kernel("pscl", "pscl")),
        "cuda": Into(cuda_kernel("pscl", "pscl")),
        "torch": portable.forward,
    },
    Backward(
        gradients=("features", "prototypes", "temperature"),
        implementations={
            "cpp": Into(native("pscl_backward")),
            "triton": Into(triton_kernel("pscl", "pscl_backward")),
            "cuda": Into(cuda_kernel("pscl", "pscl_backward")),
            "torch": portable.backward,
        },
    ),
)


class MeanInputs(NamedTuple):
    """What the mean over the positives is of; fields as those of :class:`Inputs` and ``sadcl.ops.compact.Active``."""

    features: Tensor
    prototypes: Tensor
    target: Tensor
    class_ptr: Tensor  # int32 [C + 1]
    temperature: Tensor


class Mean(NamedTuple):
    """The mean, and what the backward reads."""

    mean: Tensor  # accumulation dtype []
    score: Tensor
    norm_x: Tensor
    norm_p: Tensor
    lse: Tensor


def allocate_mean(x: MeanInputs) -> Mean:
    """Uninitialised outputs."""
    return Mean(x.features.new_empty((), dtype=accumulation_dtype(x.features.dtype)), *_statistics(x))


# The usual call in one crossing each way: without the sum, its gradient and what autograd keeps of both.
pscl_mean = Op(
    "pscl_mean",
    MeanInputs,
    Mean,
    allocate_mean,
    {"cpp": Into(native("pscl_mean_forward"))},
    Backward(
        gradients=("features", "prototypes", "temperature"),
        implementations={"cpp": Into(native("pscl_mean_backward"))},
    ),
)
