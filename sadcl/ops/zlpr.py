"""Op ``zlpr``: the zero-bounded log-sum-exp loss, one number an image; each pass reads the logits once.

Oracle: :func:`sadcl.reference.zlpr.zlpr`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._checks import check_label_values
from .._dtypes import accumulation_dtype, norm_dtype
from ..portable import zlpr as portable
from ._library import Backward, Into, Op
from ._native import native, triton_kernel


class Inputs(NamedTuple):
    """What the loss is of."""

    logits: Tensor  # [B, C] of any strides
    labels: Tensor  # [B, C], any real dtype: 1, 0, -1


class Outputs(NamedTuple):
    """The loss, and what the backward reads."""

    row_loss: Tensor  # accumulation dtype [B]
    lse: Tensor  # norm dtype [2, B]: log(1 + sum exp) of negatives, of positives


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    b = x.logits.shape[0]
    return Outputs(
        row_loss=x.logits.new_empty(b, dtype=accumulation_dtype(x.logits.dtype)),
        lse=x.logits.new_empty((2, b), dtype=norm_dtype(x.logits.device)),
    )


_FORWARD = native("zlpr_forward")


def _cpp(x: Inputs, out: Outputs) -> None:
    if not _FORWARD(x, out):
        check_label_values(x.labels)


zlpr = Op(
    "zlpr",
    Inputs,
    Outputs,
    allocate,
    {"cpp": Into(_cpp), "triton": Into(triton_kernel("zlpr", "zlpr")), "torch": portable.forward},
    Backward(
        gradients=("logits",),
        implementations={
            "cpp": Into(native("zlpr_backward")),
            "triton": Into(triton_kernel("zlpr", "zlpr_backward")),
            "torch": portable.backward,
        },
    ),
)
