"""Op ``two_way``: the two-way multi-label loss, one number an image and one a class; each pass reads the logits once.

Oracle: :func:`sadcl.reference.two_way.two_way`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._checks import check_label_values
from .._dtypes import accumulation_dtype, norm_dtype
from ..portable import two_way as portable
from ._library import Backward, Into, Op
from ._native import native, triton_kernel


class Inputs(NamedTuple):
    """What the loss is of."""

    logits: Tensor  # [B, C] of any strides
    labels: Tensor  # [B, C], any real dtype: 1, 0, -1
    positive_temperature: float
    negative_temperature: float


class Outputs(NamedTuple):
    """The losses, and what the backward reads."""

    row_loss: Tensor  # accumulation dtype [B]
    class_loss: Tensor  # accumulation dtype [C]
    row_lse: Tensor  # norm dtype [2, B]: over negatives of x / Tn, over positives of -x / Tp; -inf over none
    class_lse: Tensor  # norm dtype [2, C]


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    b, c = x.logits.shape
    acc, wide = accumulation_dtype(x.logits.dtype), norm_dtype(x.logits.device)
    return Outputs(
        row_loss=x.logits.new_empty(b, dtype=acc),
        class_loss=x.logits.new_empty(c, dtype=acc),
        row_lse=x.logits.new_empty((2, b), dtype=wide),
        class_lse=x.logits.new_empty((2, c), dtype=wide),
    )


_FORWARD = native("two_way_forward")


def _cpp(x: Inputs, out: Outputs) -> None:
    if not _FORWARD(x, out):
        check_label_values(x.labels)


two_way = Op(
    "two_way",
    Inputs,
    Outputs,
    allocate,
    {"cpp": Into(_cpp), "triton": Into(triton_kernel("two_way", "two_way")), "torch": portable.forward},
    Backward(
        gradients=("logits",),
        implementations={
            "cpp": Into(native("two_way_backward")),
            "triton": Into(triton_kernel("two_way", "two_way_backward")),
            "torch": portable.backward,
        },
    ),
    results=2,
)
