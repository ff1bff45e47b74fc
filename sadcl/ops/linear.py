"""Op ``linear``: ``x W^T + b`` on the extension's own matrix product, forward and backward, float32 throughout."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._library import Backward, Op
from ._native import native


class Inputs(NamedTuple):
    """The factors, float32 or float64."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


class Outputs(NamedTuple):
    """The result."""

    out: Tensor  # [M, N]


class _Product(NamedTuple):
    left: Tensor  # [M, K] of any strides
    right: Tensor  # [K, N]
    bias: Tensor | None  # [N]


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    return Outputs(x.x.new_empty((x.x.shape[0], x.weight.shape[0])))


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left [M, K] @ right [K, N] (+ bias)`` of any strides."""
    out = Outputs(left.new_empty((left.shape[0], right.shape[1])))
    native("linear")(_Product(left, right, bias), out)
    return out.out


def _backward(upstream: Any, x: Inputs, saved: Outputs, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    grad, grads = upstream.grad_out, {}
    if "x" in wanted:
        grads["grad_x"] = product(grad, x.weight)
    if "weight" in wanted:
        grads["grad_weight"] = product(grad.t(), x.x)
    if "bias" in wanted:
        grads["grad_bias"] = grad.sum(0)
    return grads


def _plain(upstream: Any, x: Inputs) -> dict[str, Tensor | None]:
    grad = upstream.grad_out
    return {
        "grad_x": grad @ x.weight,
        "grad_weight": grad.t() @ x.x,
        "grad_bias": None if x.bias is None else grad.sum(0),
    }


linear = Op(
    "linear",
    Inputs,
    Outputs,
    allocate,
    {"cpp": lambda x: Outputs(product(x.x, x.weight.t(), x.bias))},
    Backward(
        gradients=("x", "weight", "bias"),
        implementations={"cpp": _backward},
        partial=True,
        plain=_plain,
        instead="torch.nn.functional.linear",
    ),
)
