"""The torch.library namespace of sadcl, and what every op file needs from it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sadcl", "DEF")

# Best first; resolve() takes the first that runs on the tensors' device.
PREFERENCE = ("cpp", "triton", "torch")


def register(name: str, schema: str, implementations: dict[str, Callable[..., Any]], fake: Callable[..., Any]) -> None:
    """Define ``sadcl::name`` whose last argument, ``str backend``, picks among ``implementations``."""

    def run(*args: Any) -> Any:
        *inputs, backend = args
        if backend == "torch":
            # Autocast is still on inside an op's implementation and would round its float32 matmuls.
            with torch.autocast(inputs[0].device.type, enabled=False):
                return implementations[backend](*inputs)
        return implementations[backend](*inputs)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sadcl::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach the first derivative."""
    torch.library.register_autograd(f"sadcl::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def refuse_second_derivative(name: str) -> None:
    """Make a derivative of the backward op ``name`` a clear error instead of a missing formula."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"sadcl::{name}: second derivatives are not implemented by the fused kernels; "
            "backend='reference' is differentiable twice"
        )

    register_autograd(name, backward, lambda ctx, inputs, output: None)


def implemented(implementations: dict[str, Callable[..., Any]]) -> tuple[str, ...]:
    """The backends of an op, best first."""
    return tuple(name for name in PREFERENCE if name in implementations)


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """The launcher ``sadcl.kernels.<module>.<function>``; triton is imported by its first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"sadcl.kernels.{module}"), function)(*args)

    return run


DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}


@functools.cache
def extension() -> Any:
    """The C++ extension; resolve() has made sure that it is there."""
    return importlib.import_module("sadcl._C")


def array(tensor: Tensor) -> Any:
    """Describe a CPU tensor to the extension: address, dtype, shape, strides in elements."""
    return extension().Array(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tuple(tensor.stride()))


def norm_dtype(device: torch.device) -> torch.dtype:
    """Norms are float64, so that 1e30 and subnormal features work, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
