"""The torch.library namespace of sadcl, and what every op file needs from it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LIBRARY = torch.library.Library("sadcl", "DEF")

# Best first; resolve() takes the first that runs on the tensors' device.
PREFERENCE = ("cpp", "triton", "torch")

_EAGER: dict[str, Callable[..., Any]] = {}
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list}


def call(name: str, *args: Any) -> Any:
    """Run ``sadcl::name``: through torch's dispatcher where somebody watches, else straight to the kernel.

    Who watches: a compiler or tracer, a dispatch mode (fake tensors, a FLOP counter), a tensor subclass, meta tensors.
    For everybody else the way through the dispatcher and torch.library's wrappers is 0.1 ms a call, more than a small
    loss takes.
    """
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
        or args[0].is_meta
        or any(type(x) not in _PLAIN for x in args)
    ):
        return getattr(torch.ops.sadcl, name)(*args)
    return _EAGER[name](*args)


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
    _EAGER[name] = run


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach the first derivative ``backward(ctx, *grads)``; the gradient of an output that nobody used is None."""

    def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # else zeros would be made in place of the saved statistics' gradients
        setup_context(ctx, inputs, output)

    def derive(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    torch.library.register_autograd(f"sadcl::{name}", derive, setup_context=prepare, lib=LIBRARY)
    run = _EAGER[name]

    def forward(ctx: Any, *args: Any) -> Any:  # torch inspects the signature at every call of one without ctx: 0.1 ms
        output = run(*args)
        prepare(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(derive)}
    function: Any = type(f"sadcl_{name}", (torch.autograd.Function,), methods)
    _EAGER[name] = function.apply


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
    return extension().Array(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride())


def norm_dtype(device: torch.device) -> torch.dtype:
    """Norms are float64, so that 1e30 and subnormal features work, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
