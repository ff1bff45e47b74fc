"""The way into the C++ extension and to the launchers of Triton and CUDA kernels: by field name, never by position."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    """The C++ extension, which knows torch's dtypes from here; resolve() has made sure that it is there."""
    module = importlib.import_module("sadcl._C")
    module.set_dtypes(DTYPE_CODES)
    return module


def array(tensor: Tensor) -> Any:
    """Describe a CPU tensor to the extension: address, dtype (a checked one), shape, strides in elements."""
    return extension().Array(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride())


def native(name: str) -> Callable[..., Any]:
    """``sadcl._C.<name>`` as a function of NamedTuples, whose fields are its arguments: ``run(x, out)``.

    ``others`` come on top, or take a field's place.
    """

    def run(*parts: Any, **others: Any) -> Any:
        return getattr(extension(), name)(*parts, **others, threads=torch.get_num_threads())

    return run


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """The launcher ``sadcl.kernels.<module>.<function>``; triton is imported by its first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"sadcl.kernels.{module}"), function)(*args)

    return run


def cuda_kernel(module: str, function: str) -> Callable[..., Any]:
    """The launcher ``sadcl.cuda.<module>.<function>``, imported by its first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"sadcl.cuda.{module}"), function)(*args)

    return run


def resolved(op: str, x: Any) -> Any:
    """``x`` as kernels may read it, which see an address: on one device, nothing lazy (negated, zero).

    Raises:
        ValueError: naming the argument, if a tensor is on another device than the first one.
    """
    device = x[0].device
    lazy = False
    for value in x:
        if isinstance(value, Tensor):
            if value.device != device:
                _refuse_devices(op, x)
            if value.is_neg() or value._is_zerotensor():
                lazy = True
    return type(x)(*(_materialised(value) for value in x)) if lazy else x


def _refuse_devices(op: str, x: Any) -> None:
    device = x[0].device
    for name, value in zip(x._fields, x, strict=True):
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{name}: expected a tensor on {device}, as {x._fields[0]} is, got one on {value.device} ({op})"
            )


def _materialised(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_conj().resolve_neg()
