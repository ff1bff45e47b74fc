"""Op ``pscl``: prototype-to-sample contrastive loss, one number per class.

Forward keeps the ``[B, C]`` scores, the norms and two log-sum-exps per class; backward needs no product of features
with prototypes again. These are float64: a gradient row hangs on one difference of two softmax weights, and a float32
score of 1 / 0.07 is already off by 5e-7. Oracle: :func:`sadcl.reference.pscl.pscl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ._library import (
    array,
    call,
    extension,
    implemented,
    norm_dtype,
    refuse_second_derivative,
    register,
    register_autograd,
    triton_kernel,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _allocate(features: Tensor, prototypes: Tensor) -> Outputs:
    """Uninitialised (class_loss, score, norm_x, norm_p, lse)."""
    b, c, _ = features.shape
    acc, wide = accumulation_dtype(features.dtype), norm_dtype(features.device)
    return (
        features.new_empty(c, dtype=acc),
        features.new_empty((b, c), dtype=wide),
        features.new_empty((b, c), dtype=wide),
        features.new_empty(c, dtype=wide),
        features.new_empty((2, c), dtype=wide),
    )


def _fake(
    features: Tensor, prototypes: Tensor, target: Tensor, temperature: Tensor, released: bool, backend: str
) -> Outputs:
    return _allocate(features, prototypes)


def _cpp(features: Tensor, prototypes: Tensor, target: Tensor, temperature: Tensor, released: bool) -> Outputs:
    outputs = _allocate(features, prototypes)
    extension().pscl_forward(
        array(features), array(prototypes), array(target), temperature.item(), released,
        *(array(output) for output in outputs), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


# Images at a time, so that float64 copies of them stay in a CPU's cache (2 MB); elsewhere launches cost more.
_CHUNK = {"cpu": 1 << 18}


def _chunks(features: Tensor) -> Iterator[slice]:
    b, c, d = features.shape
    step = max(1, _CHUNK.get(features.device.type, 1 << 24) // (c * d))
    return (slice(start, start + step) for start in range(0, b, step))


def _safe(norm: Tensor) -> Tensor:
    """To divide by: a zero vector stays one."""
    return torch.where(norm == 0, 1.0, norm)


def _torch(features: Tensor, prototypes: Tensor, target: Tensor, temperature: Tensor, released: bool) -> Outputs:
    class_loss, score, norm_x, norm_p, lse = _allocate(features, prototypes)
    wide = norm_p.dtype
    torch.linalg.vector_norm(prototypes.to(wide), dim=-1, out=norm_p)
    unit = prototypes.to(wide) / _safe(norm_p)[:, None]
    for part in _chunks(features):
        x = features[part].to(wide)
        norm_x[part] = torch.linalg.vector_norm(x, dim=-1)
        score[part] = torch.linalg.vecdot(x, unit) / _safe(norm_x[part])
    score /= temperature
    positive, valid = target == 1, target != -1
    lse[0], lse[1] = _logsumexp(score, valid), _logsumexp(score, positive)
    has_positive = positive.any(dim=0)
    class_loss.copy_(torch.where(has_positive, lse[0] - lse[1], 0.0))
    if released:
        highest = score.masked_fill(~valid, float("-inf")).amax(dim=0)
        class_loss.copy_(torch.where(~has_positive & valid.any(dim=0), lse[0] - highest, class_loss))
    return class_loss, score, norm_x, norm_p, lse


def _logsumexp(score: Tensor, chosen: Tensor) -> Tensor:
    """Over the chosen images of each class; ``-inf`` where there is none."""
    return torch.logsumexp(score.masked_fill(~chosen, float("-inf")), dim=0)


def _backward_fake(
    grad_class: Tensor,
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    temperature: Tensor,
    score: Tensor,
    norm_x: Tensor,
    norm_p: Tensor,
    lse: Tensor,
    released: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return features.new_empty(features.shape), prototypes.new_empty(prototypes.shape), torch.empty_like(temperature)


def _backward_cpp(
    grad_class: Tensor,
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    temperature: Tensor,
    score: Tensor,
    norm_x: Tensor,
    norm_p: Tensor,
    lse: Tensor,
    released: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_features, grad_prototypes = features.new_empty(features.shape), prototypes.new_empty(prototypes.shape)
    grad_temperature = extension().pscl_backward(
        array(grad_class), array(features), array(prototypes), array(target), temperature.item(),
        array(score), array(norm_x), array(norm_p), array(lse), released,
        array(grad_features), array(grad_prototypes), torch.get_num_threads(),
    )  # fmt: skip
    return grad_features, grad_prototypes, torch.full_like(temperature, grad_temperature)


def _backward_torch(
    grad_class: Tensor,
    features: Tensor,
    prototypes: Tensor,
    target: Tensor,
    temperature: Tensor,
    score: Tensor,
    norm_x: Tensor,
    norm_p: Tensor,
    lse: Tensor,
    released: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    positive, valid = target == 1, target != -1
    has_positive = positive.any(dim=0)
    # dL/ds = G (softmax over the valid images - softmax over the positive ones)
    grad_score = torch.where(valid, torch.exp(score - lse[0]), 0.0)
    grad_score = grad_score - torch.where(positive, torch.exp(score - lse[1]), 0.0)
    if not released:
        grad_score = torch.where(has_positive, grad_score, 0.0)
    grad_score = grad_score * grad_class
    grad_temperature = -(grad_score * torch.where(valid, score, 0.0)).sum() / temperature
    wide = norm_p.dtype
    unit = prototypes.to(wide) / _safe(norm_p)[:, None]
    grad_cosine = torch.where(valid, grad_score / temperature, 0.0)[..., None]
    cosine = torch.where(valid, score * temperature, 0.0)[..., None]
    has_length, grad_unit = (norm_x > 0)[..., None], torch.zeros_like(unit)
    grad_features = features.new_empty(features.shape)
    for part in _chunks(features):
        length = _safe(norm_x[part])[..., None]
        z = torch.where(valid[part][..., None], features[part].to(wide), 0.0).div_(length)
        # dL/dz through the normalisations: (u - cos z) / |x| and (z - cos u) / |p|, 0 for zero vectors
        grad_unit += (grad_cosine[part] * (z - cosine[part] * unit)).sum(dim=0)
        grad_features[part] = has_length[part] * grad_cosine[part] * (unit - cosine[part] * z) / length
    grad_prototypes = torch.where(norm_p[:, None] == 0, 0.0, grad_unit / _safe(norm_p)[:, None])
    return grad_features, grad_prototypes.to(prototypes.dtype), grad_temperature.to(temperature.dtype)


_IMPLEMENTATIONS = {"cpp": _cpp, "triton": triton_kernel("pscl", "pscl"), "torch": _torch}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "pscl",
    "(Tensor features, Tensor prototypes, Tensor target, Tensor temperature, bool released, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _IMPLEMENTATIONS,
    _fake,
)
register(
    "pscl_backward",
    "(Tensor grad_class, Tensor features, Tensor prototypes, Tensor target, Tensor temperature, Tensor score,"
    " Tensor norm_x, Tensor norm_p, Tensor lse, bool released, str backend) -> (Tensor, Tensor, Tensor)",
    {"cpp": _backward_cpp, "triton": triton_kernel("pscl", "pscl_backward"), "torch": _backward_torch},
    _backward_fake,
)
refuse_second_derivative("pscl_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    features, prototypes, target, temperature, released, backend = inputs
    _, score, norm_x, norm_p, lse = output
    ctx.save_for_backward(features, prototypes, target, temperature, score, norm_x, norm_p, lse)
    ctx.mark_non_differentiable(score, norm_x, norm_p, lse)
    ctx.released, ctx.backend = released, backend


def _autograd(ctx: Any, grad_class: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = call("pscl_backward", grad_class, *ctx.saved_tensors, ctx.released, ctx.backend)
    grad_features, grad_prototypes, grad_temperature = grads
    return grad_features, grad_prototypes, None, grad_temperature, None, None


register_autograd("pscl", _autograd, _setup_context)


def pscl(
    features: Tensor, prototypes: Tensor, target: Tensor, temperature: Tensor, backend: str, *, released: bool = False
) -> Tensor:
    """Loss of every class, ``[C]`` in the accumulation dtype.

    Args:
        features: ``[B, C, D]`` of any strides.
        prototypes: ``[C, D]``.
        target: int8 ``[B, C]``, see :class:`sadcl.ops.compact.Active`.
        temperature: 0-d tensor of the accumulation dtype.
        backend: a name out of :data:`IMPLEMENTED`.
        released: add the released code's term for classes without a positive.
    """
    return call("pscl", features, prototypes, target, temperature, released, backend)[0]
