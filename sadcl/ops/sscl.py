"""Op ``sscl``: batched supervised contrastive loss over compacted rows.

Forward gives the loss of every anchor and the row statistics that the backward needs (log-sum-exp and norm: float32 and
float64 per row, never a matrix, but for the CPU's cache tile). Backward takes one upstream number per anchor, so
reductions, sample weights, class weights and the released formulation's anchor test are plain arithmetic on
``[B, V, C]`` outside.

Rows are in the order of the pairs: ``i = p * V + v`` is feature row ``(b, v, c)`` with ``pairs[p] = b * C + c``.
Oracle: :func:`sadcl.reference.sscl.sscl`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..portable import sscl as sscl_portable
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

# Scores of a small problem are kept for the backward where they fit the cache: 1 MB of float32. Of a larger one as many
# as this times its unit vectors: all of them up to N = 7 D, 3 N^2 D flops instead of 4, and memory stays linear in N.
TILE_ELEMENTS = 1 << 18
KEPT_OF_VECTORS = 3.5

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def scores_to_keep(features: Tensor, pairs: Tensor, class_ptr: Tensor, backend: str) -> int:
    """How many scores the forward keeps for the backward."""
    if backend != "cpp":
        return 0
    v, d = features.shape[1], features.shape[3]
    most = (pairs.shape[0] * v) ** 2
    if most <= TILE_ELEMENTS or torch.compiler.is_compiling():  # a traced shape must not depend on the labels
        return min(most, TILE_ELEMENTS)
    n = v * int(class_ptr[-1])
    if n * n <= TILE_ELEMENTS:
        return n * n
    half, room = (n + 192) * n // 2, int(KEPT_OF_VECTORS * n * d)  # blocks of 192 rows, those on the diagonal whole
    return min(half, room) if half <= 2 * room else 0


def _allocate(features: Tensor, pairs: Tensor, keep: int) -> Outputs:
    """Uninitialised (row_loss, lse, norm, tile)."""
    b, v, c, _ = features.shape
    dtype = accumulation_dtype(features.dtype)
    capacity = pairs.shape[0] * v
    return (
        features.new_empty((b, v, c), dtype=dtype),
        features.new_empty(capacity, dtype=dtype),
        features.new_empty(capacity, dtype=torch.float64),
        features.new_empty(keep, dtype=dtype),
    )


def _fake(
    features: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    temperature: Tensor,
    normalize: bool,
    released: bool,
    keep: int,
    backend: str,
) -> Outputs:
    return _allocate(features, pairs, keep if backend == "cpp" else 0)


def _cpp(
    features: Tensor, pairs: Tensor, class_ptr: Tensor, temperature: Tensor, normalize: bool, released: bool, keep: int
) -> Outputs:
    row_loss, lse, norm, tile = _allocate(features, pairs, keep)
    extension().sscl_forward(
        array(features), array(pairs), array(class_ptr), temperature.item(), normalize, released,
        array(row_loss), array(lse), array(norm), array(tile), torch.get_num_threads(),
    )  # fmt: skip
    return row_loss, lse, norm, tile


def _torch(
    features: Tensor, pairs: Tensor, class_ptr: Tensor, temperature: Tensor, normalize: bool, released: bool, keep: int
) -> Outputs:
    row_loss, lse, norm = sscl_portable.forward(features, pairs, class_ptr, temperature, normalize, released)
    return row_loss, lse, norm, row_loss.new_empty(0)


def _backward_fake(
    grad_rows: Tensor,
    features: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    temperature: Tensor,
    lse: Tensor,
    norm: Tensor,
    tile: Tensor,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), torch.empty_like(temperature)


def _backward_cpp(
    grad_rows: Tensor,
    features: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    temperature: Tensor,
    lse: Tensor,
    norm: Tensor,
    tile: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    grad_features = features.new_empty(features.shape)
    grad_temperature = extension().sscl_backward(
        array(grad_rows), array(features), array(pairs), array(class_ptr), temperature.item(),
        array(lse), array(norm), array(tile), normalize, array(grad_features), False, torch.get_num_threads(),
    )  # fmt: skip
    return grad_features, torch.full_like(temperature, grad_temperature)


_IMPLEMENTATIONS = {"cpp": _cpp, "triton": triton_kernel("sscl", "sscl"), "torch": _torch}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "sscl",
    "(Tensor features, Tensor pairs, Tensor class_ptr, Tensor temperature, bool normalize, bool released, int keep,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _IMPLEMENTATIONS,
    _fake,
)
register(
    "sscl_backward",
    "(Tensor grad_rows, Tensor features, Tensor pairs, Tensor class_ptr, Tensor temperature, Tensor lse, Tensor norm,"
    " Tensor tile, bool normalize, str backend) -> (Tensor, Tensor)",
    {
        "cpp": _backward_cpp,
        "triton": triton_kernel("sscl_backward", "sscl_backward"),
        "torch": sscl_portable.backward,
    },
    _backward_fake,
)
refuse_second_derivative("sscl_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    features, pairs, class_ptr, temperature, normalize, _, _, backend = inputs
    _, lse, norm, tile = output
    ctx.save_for_backward(features, pairs, class_ptr, temperature, lse, norm, tile)
    ctx.mark_non_differentiable(lse, norm, tile)
    ctx.normalize, ctx.backend = normalize, backend


def _autograd(ctx: Any, grad_rows: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_features, grad_temperature = call("sscl_backward", grad_rows, *ctx.saved_tensors, ctx.normalize, ctx.backend)
    return grad_features, None, None, grad_temperature, None, None, None, None


register_autograd("sscl", _autograd, _setup_context)


def sscl(
    features: Tensor,
    pairs: Tensor,
    class_ptr: Tensor,
    temperature: Tensor,
    backend: str,
    *,
    normalize: bool = True,
    released: bool = False,
) -> Tensor:
    """Loss of every anchor, ``[B, V, C]`` in the accumulation dtype, 0 where inactive.

    Args:
        features: ``[B, V, C, D]`` of any strides.
        pairs: int32 ``[capacity]``, see :class:`sadcl.ops.compact.Active`.
        class_ptr: int32 ``[K + 1]``: positives of a row are the other rows of its segment. ``K`` need not be ``C``.
        temperature: 0-d tensor of the accumulation dtype.
        backend: a name out of :data:`IMPLEMENTED`.
        normalize: use ``x / |x|``; otherwise ``x`` as it is.
        released: the released code's value and normaliser.
    """
    save = torch.is_grad_enabled() and (features.requires_grad or temperature.requires_grad)
    keep = scores_to_keep(features, pairs, class_ptr, backend) if save else 0
    return call("sscl", features, pairs, class_ptr, temperature, normalize, released, keep, backend)[0]
