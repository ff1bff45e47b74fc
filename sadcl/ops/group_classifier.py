"""Op ``group_classifier``: one linear classifier per class, ``logit[b, c] = <weight[c], h[b, c]> + bias[c]``.

Oracle: :func:`sadcl.reference.group_classifier.group_classifier`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..portable import group_classifier as portable
from ._library import Backward, Into, Op
from ._native import native, triton_kernel


class Inputs(NamedTuple):
    """What is classified, and by what."""

    features: Tensor  # label features h [B, C, E] of any strides
    weight: Tensor  # [C, E]
    bias: Tensor  # [C]


class Outputs(NamedTuple):
    """The result."""

    logits: Tensor  # [B, C], in the dtype that features and weight promote to


class _Upstream(NamedTuple):
    grad_logits: Tensor


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    dtype = torch.promote_types(x.features.dtype, x.weight.dtype)
    return Outputs(x.features.new_empty(x.features.shape[:2], dtype=dtype))


def _same_width(x: Inputs) -> Inputs:
    """The kernel reads mixed half and float32 in place, but float64 only together with float64."""
    if (x.features.dtype == torch.float64) == (x.weight.dtype == torch.float64):
        return x
    return x._replace(features=x.features.double(), weight=x.weight.double())


def _cpp(x: Inputs) -> Outputs:
    dtype = torch.promote_types(x.features.dtype, x.weight.dtype)
    acc = accumulation_dtype(dtype)
    out = Outputs(x.features.new_empty(x.features.shape[:2], dtype=acc))
    native("group_classifier_forward")(_same_width(x)._replace(bias=x.bias.to(acc).contiguous()), out)
    return Outputs(out.logits.to(dtype))


def _with_bias(of_others: Any) -> Into:
    """``of_others``, and the bias's gradient."""

    def run(upstream: Any, x: Any, saved: Any, out: Any) -> None:
        if out.grad_features is not None or out.grad_weight is not None:
            of_others(upstream, x, saved, out)
        if out.grad_bias is not None:
            out.grad_bias.copy_(upstream.grad_logits.sum(dim=0))

    return Into(run)


def _backward_cpp(upstream: Any, x: Inputs, saved: Outputs, out: Any) -> None:
    same = _same_width(x)
    given = _Upstream(upstream.grad_logits.to(accumulation_dtype(same.features.dtype)))
    if same is x:
        native("group_classifier_backward")(given, same, out)
        return
    wide = out._replace(
        grad_features=None if out.grad_features is None else out.grad_features.double(),
        grad_weight=None if out.grad_weight is None else out.grad_weight.double(),
    )
    native("group_classifier_backward")(given, same, wide)
    for narrow, value in ((out.grad_features, wide.grad_features), (out.grad_weight, wide.grad_weight)):
        if narrow is not None and narrow is not value:
            narrow.copy_(value)


group_classifier = Op(
    "group_classifier",
    Inputs,
    Outputs,
    allocate,
    {"cpp": _cpp, "triton": Into(triton_kernel("group_classifier", "group_classifier")), "torch": portable.forward},
    Backward(
        gradients=("features", "weight", "bias"),
        implementations={
            "cpp": _with_bias(_backward_cpp),
            "triton": _with_bias(triton_kernel("group_classifier", "group_classifier_backward")),
            "torch": _with_bias(portable.backward),
        },
        partial=True,
        plain=portable.gradients,
        instead="backend='torch'",
    ),
)
