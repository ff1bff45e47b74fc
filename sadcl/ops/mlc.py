"""Op ``mlc``: image-level multi-label contrastive losses, the loss of every anchor.

Forward keeps a few numbers an anchor; backward recomputes the scores (a CPU keeps those that there is room for, or
the whole gradient, where keys pass by once). What follows the op (``a_i``, sample weights, the
reduction) is plain arithmetic on ``[B, V]``. Oracle: :func:`sadcl.reference.mlc.mlc`.

The derivatives by class weights and by dense weights are plain torch on every backend: they are rarely asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype, without_autocast
from ..portable import mlc as portable
from ..portable.mlc import DENSE, MSC, WEIGHTINGS
from ._library import Backward, Into, Op
from ._native import cuda_kernel, extension, native, triton_kernel
from ._transforms import watched

__all__ = [
    "DENSE",
    "MSC",
    "WEIGHTINGS",
    "Inputs",
    "Outputs",
    "allocate",
    "mlc",
    "numbers_to_keep",
]


class Inputs(NamedTuple):
    """What the loss is of. Anchors are the N = B V rows (b, v)."""

    features: Tensor  # [B, V, D] of any strides
    labels: Tensor | None  # [B, C], any real dtype: 1, 0, -1; None if dense
    keys: Tensor | None  # [K, D]
    key_labels: Tensor | None  # [K, C]
    prototypes: Tensor | None  # [C, D], with msc
    weights: Tensor | None  # [N, columns], if dense
    class_weight: Tensor | None  # [C] in the accumulation dtype, with mulsupcon and msc
    temperature: Tensor  # [] in the accumulation dtype
    weighting: int  # index into WEIGHTINGS, or DENSE
    threshold: float
    alpha: float
    beta: float
    include_batch: bool  # the rows are columns
    normalize: bool  # use x / |x|; otherwise x as it is
    keep: int  # numbers to keep for the backward, see numbers_to_keep


class Outputs(NamedTuple):
    """The loss, and what the backward reads."""

    row_loss: Tensor  # accumulation dtype [B, V]
    lse: Tensor  # norm dtype [N]; +inf for an anchor without a positive
    norm: Tensor  # norm dtype [N + K + prototypes]
    kept: Tensor  # accumulation dtype [keep]


def numbers_to_keep(features: Tensor, keys: Tensor | None, include_batch: bool, needs_grad: bool, backend: str) -> int:
    """What the forward should keep for the backward: nothing, unless one is coming. ``csrc/mlc.h`` says what it is."""
    if backend != "cpp" or not needs_grad:
        return 0
    b, v, d = features.shape
    if include_batch:
        # A traced shape must not be compared with anything.
        return 2 * b * v if watched(features) or features.is_meta else int(extension().mlc_keep(b * v, d))
    if keys is None or keys.requires_grad:
        return 0
    return b * v * d + 1


_BY_PAIR = ("all", "any", "jaccard", "overlap", "simdis")


def size_of(features: Tensor, keys: Tensor | None, weighting: str, dense: bool) -> tuple[int, ...]:
    """What resolve() is told of a problem: its vectors; nothing where the CUDA kernels cannot take it."""
    if dense or weighting not in _BY_PAIR or features.dtype == torch.float64:
        return ()
    return (features.shape[0] * features.shape[1] + (0 if keys is None else keys.shape[0]),)


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    b, v, _ = x.features.shape
    vectors = b * v + sum(part.shape[0] for part in (x.keys, x.prototypes) if part is not None)
    wide = norm_dtype(x.features.device)
    return Outputs(
        row_loss=x.features.new_empty((b, v), dtype=accumulation_dtype(x.features.dtype)),
        lse=x.features.new_empty(b * v, dtype=wide),
        norm=x.features.new_empty(vectors, dtype=wide),
        kept=x.features.new_empty(x.keep, dtype=accumulation_dtype(x.features.dtype)),
    )


def _checked(x: Inputs) -> Inputs:
    for name, labels in (("labels", x.labels), ("key_labels", x.key_labels)):
        if labels is not None and _checks.reads_values(labels):
            _checks.check_label_values(labels, name)
    if x.weights is not None:
        _checks.check_weight_values("weights", x.weights)
    return x


_FORWARD, _BACKWARD = native("mlc_forward"), native("mlc_backward")
_RARE = ("weights", "class_weight")


def _cpp(x: Inputs, out: Outputs) -> None:
    if x.weights is not None:
        _checks.check_weight_values("weights", x.weights)
    if x.class_weight is not None:
        x = x._replace(class_weight=x.class_weight.contiguous())
    if not _FORWARD(x, out):
        _checked(x)


def _triton(x: Inputs, out: Outputs) -> None:
    if x.weights is not None:
        _checks.check_weight_values("weights", x.weights)
    triton_kernel("mlc", "mlc")(x, out)


def _backward_cpp(upstream: Any, x: Inputs, saved: Outputs, out: Any) -> None:
    if x.class_weight is not None:
        x = x._replace(class_weight=x.class_weight.contiguous())
    _BACKWARD(upstream, x, saved, out)
    _fill_rare(upstream, x, saved, out)


def _backward_triton(upstream: Any, x: Inputs, saved: Outputs, out: Any) -> None:
    triton_kernel("mlc_backward", "mlc_backward")(upstream, x, saved, out)
    with without_autocast(x.features.device):
        _fill_rare(upstream, x, saved, out)


def _backward_cuda(upstream: Any, x: Inputs, saved: Outputs, out: Any) -> None:
    cuda_kernel("mlc", "mlc_backward")(upstream, x, saved, out)
    with without_autocast(x.features.device):
        _fill_rare(upstream, x, saved, out)


def _fill_rare(upstream: Any, x: Inputs, saved: Outputs, out: Any) -> None:
    rare = tuple(name for name in _RARE if getattr(out, f"grad_{name}") is not None)
    if rare:
        for name, grad in portable.backward(upstream, x, saved, rare).items():
            getattr(out, name).copy_(grad)


mlc = Op(
    "mlc",
    Inputs,
    Outputs,
    allocate,
    {
        "cpp": Into(_cpp),
        "triton": Into(_triton),
        "cuda": Into(cuda_kernel("mlc", "mlc")),
        "torch": lambda x: portable.forward(_checked(x)),
    },
    Backward(
        gradients=("features", "keys", "prototypes", "weights", "class_weight", "temperature"),
        implementations={
            "cpp": Into(_backward_cpp),
            "triton": Into(_backward_triton),
            "cuda": Into(_backward_cuda),
            "torch": portable.backward,
        },
        partial=True,
    ),
)
