"""Op ``group_classifier``: one linear classifier per class, ``logit[b, c] = <weight[c], h[b, c]> + bias[c]``.

Oracle: :func:`sadcl.reference.group_classifier.group_classifier`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._library import (
    array,
    call,
    extension,
    implemented,
    refuse_second_derivative,
    register,
    register_autograd,
    triton_kernel,
)


def _dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, weight.dtype)


def _fake(features: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=_dtype(features, weight))


def _cpp(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = _dtype(features, weight)
    acc = accumulation_dtype(dtype)
    features, weight = _same_width(features, weight)
    bias = bias.to(acc).contiguous()
    logits = features.new_empty(features.shape[:2], dtype=acc)
    extension().group_classifier_forward(
        array(features), array(weight), array(bias), array(logits), torch.get_num_threads()
    )
    return logits.to(dtype)


def _same_width(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel reads mixed half and float32 in place, but float64 only together with float64."""
    if (features.dtype == torch.float64) == (weight.dtype == torch.float64):
        return features, weight
    return features.double(), weight.double()


def _torch(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = _dtype(features, weight)
    acc = accumulation_dtype(dtype)
    return ((features.to(acc) * weight.to(acc)).sum(dim=-1) + bias.to(acc)).to(dtype)


def _backward_fake(
    grad_logits: Tensor, features: Tensor, weight: Tensor, need_features: bool, need_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _backward_cpp(
    grad_logits: Tensor, features: Tensor, weight: Tensor, need_features: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    x, w = _same_width(features, weight)
    upstream = grad_logits.to(accumulation_dtype(x.dtype))
    grads = _backward_fake(grad_logits, x, w, need_features, need_weight, "cpp")
    extension().group_classifier_backward(
        array(upstream), array(x), array(w),
        array(grads[0]) if need_features else None, array(grads[1]) if need_weight else None, torch.get_num_threads(),
    )  # fmt: skip
    return grads[0].to(features.dtype), grads[1].to(weight.dtype)


def _backward_torch(
    grad_logits: Tensor, features: Tensor, weight: Tensor, need_features: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(_dtype(features, weight))
    upstream = grad_logits.to(acc)[..., None]
    grads = list(_backward_fake(grad_logits, features, weight, False, False, "torch"))
    if need_features:
        grads[0] = (upstream * weight.to(acc)).to(features.dtype).contiguous()
    if need_weight:
        grads[1] = (upstream * features.to(acc)).sum(dim=0).to(weight.dtype).contiguous()
    return grads[0], grads[1]


_IMPLEMENTATIONS = {"cpp": _cpp, "triton": triton_kernel("group_classifier", "group_classifier"), "torch": _torch}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "group_classifier", "(Tensor features, Tensor weight, Tensor bias, str backend) -> Tensor", _IMPLEMENTATIONS, _fake
)
register(
    "group_classifier_backward",
    "(Tensor grad_logits, Tensor features, Tensor weight, bool need_features, bool need_weight, str backend)"
    " -> (Tensor, Tensor)",
    {
        "cpp": _backward_cpp,
        "triton": triton_kernel("group_classifier", "group_classifier_backward"),
        "torch": _backward_torch,
    },
    _backward_fake,
)
refuse_second_derivative("group_classifier_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, bias, backend = inputs
    ctx.save_for_backward(features, weight)
    ctx.bias_dtype, ctx.backend = bias.dtype, backend


def _autograd(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    need_features, need_weight, need_bias, _ = ctx.needs_input_grad
    grad_features = grad_weight = None
    if need_features or need_weight:
        grad_features, grad_weight = call(
            "group_classifier_backward", grad_logits, *ctx.saved_tensors, need_features, need_weight, ctx.backend
        )
    return (
        grad_features if need_features else None,
        grad_weight if need_weight else None,
        grad_logits.sum(dim=0).to(ctx.bias_dtype) if need_bias else None,
        None,
    )


register_autograd("group_classifier", _autograd, _setup_context)


def group_classifier(features: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Logits ``[B, C]``, in the dtype that features and weight promote to.

    Args:
        features: label features h ``[B, C, E]`` of any strides.
        weight: ``[C, E]``.
        bias: ``[C]``.
        backend: a name out of :data:`IMPLEMENTED`.
    """
    return call("group_classifier", features, weight, bias, backend)
