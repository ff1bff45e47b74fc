"""Op ``linear``: ``x W^T + b`` on the extension's own matrix product, forward and backward, float32 throughout.

Why: torch's fp32 product is MKL's, which on AMD processors with AVX-512 runs at a third of what they can do. Which
one runs is decided by the processor alone, and by ``SADCL_LINEAR``:

- ``auto`` (default): ours on AMD processors with AVX-512, torch's everywhere else. On a Zen 3 (AVX2) both reach the
  same speed within 10 %, so torch's stays there.
- ``cpp`` or ``torch``: that one.

Ours takes CPU float32 and float64; other tensors, and everything under autocast, go to torch. Precision is never
lowered.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import backends
from .._checks import check_choice
from ._library import array, call, extension, refuse_second_derivative, register, register_autograd

SWITCH = "SADCL_LINEAR"


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``left [M, K] @ right [K, N] (+ bias)`` of any strides."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    given = None if bias is None else array(bias)
    extension().linear(array(left), array(right), given, array(out), torch.get_num_threads())
    return out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight.t(), bias)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if wanted[0] else (0,)), x.new_empty(weight.shape if wanted[1] else (0,))


def _backward_cpp(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    return (
        _product(grad, weight, None) if wanted[0] else x.new_empty(0),
        _product(grad.t(), x, None) if wanted[1] else x.new_empty(0),
    )


register("linear", "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", {"cpp": _cpp}, _fake)
register(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[] wanted, str backend) -> (Tensor, Tensor)",
    {"cpp": _backward_cpp},
    _backward_fake,
)
refuse_second_derivative("linear_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    d_x, d_weight = call("linear_backward", grad, *ctx.saved_tensors, [needs[0], needs[1]], ctx.backend)
    return d_x if needs[0] else None, d_weight if needs[1] else None, grad.sum(0) if needs[2] else None, None


register_autograd("linear", _autograd, _setup_context)


def _probe() -> bool:
    """Whether this is an AMD processor whose AVX-512 our kernels use."""
    if not backends()["cpp"].available or not extension().isa().startswith("avx512"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


OURS_IS_FASTER = _probe()  # when this module loads: a call under torch.compile only reads it


def _chosen() -> str:
    asked = check_choice(SWITCH, os.environ.get(SWITCH) or "auto", ("auto", "cpp", "torch"))
    if asked == "auto":
        return "cpp" if OURS_IS_FASTER else "torch"
    if asked == "cpp" and not backends()["cpp"].available:
        raise RuntimeError(f"{SWITCH}='cpp': {backends()['cpp'].reason}")
    return asked


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` by the faster of two float32 products.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    fits = x.dtype in (torch.float32, torch.float64)
    fits = fits and all(t.dtype == x.dtype and t.device.type == "cpu" for t in given)
    if not fits or x.numel() == 0 or torch.is_autocast_enabled("cpu") or _chosen() == "torch":
        return F.linear(x, weight, bias)
    return call("linear", x.reshape(-1, x.shape[-1]), weight, bias, "cpp").unflatten(0, x.shape[:-1])


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` on :func:`linear`: same parameters, same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        return linear(input, self.weight, self.bias)
