"""Argument checks shared by the public functions: every message names the argument, what came, what was expected."""

from __future__ import annotations

import numbers
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._dtypes import FLOATING, REAL, accumulation_dtype


def reads_values(tensor: Tensor) -> bool:
    """Whether values are checked: on a CPU always, on a GPU, where the host would wait, with ``SADCL_CHECK=1``."""
    return tensor.device.type == "cpu" or (os.environ.get("SADCL_CHECK") == "1" and not tensor.is_meta)


def holds_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values to read here: not under a compiler or tracer, torch.func, or as a fake tensor."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or tensor.is_meta
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, which the kernels have none of."""
    return forward_ad._current_level >= 0


def check_tensor(name: str, value: object, dims: tuple[int, ...], layout: str) -> Tensor:
    """Return ``value`` if it is a tensor whose rank is in ``dims``; ``layout`` names the expected shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor {layout}, got layout {value.layout}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(value.shape)}")
    return value


def check_floating(name: str, value: Tensor) -> None:
    """Require a floating dtype that every backend computes with."""
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a floating point dtype, got {value.dtype}; float32, bfloat16, float16, float64 are read"
        )


def check_real(name: str, value: Tensor) -> None:
    """Require a dtype whose numbers every backend reads."""
    if value.dtype not in REAL:
        raise TypeError(
            f"{name}: expected a real dtype (floating point of 16 to 64 bits, bool, uint8 or a signed integer), "
            f"got {value.dtype}"
        )


def check_size(name: str, value: Tensor, dim: int, expected: int, axis: str, other: str) -> None:
    """Require ``value.shape[dim] == expected``, a size that ``other`` gave to ``axis``."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected {axis}={expected} (from {other}) in dimension {dim}, got shape {tuple(value.shape)}"
        )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}: expected one device")


def check_devices(**tensors: Tensor | None) -> None:
    """Require all of the named tensors, None apart, on the device of the first: a kernel reads addresses."""
    named = ((name, value) for name, value in tensors.items() if value is not None)
    first_name, first = next(named)
    for name, value in named:
        check_same_device(name, value, first_name, first)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Require one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_nonempty(name: str, value: Tensor) -> None:
    """Require at least one element in every dimension."""
    if 0 in value.shape:
        raise ValueError(f"{name}: expected no empty dimension, got shape {tuple(value.shape)}")


def check_label_values(labels: Tensor, name: str = "labels") -> None:
    """Raise a ValueError that names the values that are not 0, 1 or -1. Reads the labels: a sync on a GPU."""
    if torch.equal(labels.sign(), labels):  # what is usual, in two operators; NaN takes the other way
        return
    # A comparison with -1 would call 255 ignored in unsigned labels.
    ignored = (labels == -1) if labels.dtype.is_signed else torch.zeros_like(labels, dtype=torch.bool)
    wrong = labels[~((labels == 0) | (labels == 1) | ignored)]
    if wrong.numel() > 0:
        values = ", ".join(f"{value:g}" for value in wrong.double().unique()[:5].tolist())
        raise ValueError(f"{name}: expected 0, 1 or -1 (ignored), got values {values}")


def check_compactable(labels: Tensor) -> tuple[int, int]:
    """Sizes of labels ``[B, C]`` that a GPU kernel compacts; a ValueError for values or sizes that it does not take."""
    if reads_values(labels):
        check_label_values(labels)
    b, c = labels.shape
    if b * c >= 1 << 31:
        raise ValueError(f"labels: pairs are int32, so expected B * C < 2^31, got {b} * {c}")
    return b, c


def check_weight_values(name: str, weights: Tensor) -> None:
    """Raise a ValueError that names a weight that is negative or not finite, where values are read."""
    if not reads_values(weights) or weights.numel() == 0:
        return
    lowest, highest = torch.aminmax(weights.detach())  # one pass; NaN is both
    if not (lowest.item() >= 0 and highest.item() < float("inf")):
        wrong = weights[~((weights >= 0) & (weights < float("inf")))]
        raise ValueError(f"{name}: expected finite numbers >= 0, got {wrong[0].item():g}")


def check_soft_labels(labels: Tensor) -> None:
    """Raise a ValueError that names the values outside [0, 1] that are not -1. Reads the labels: a sync on a GPU."""
    if labels.numel() == 0 or labels.dtype == torch.bool:
        return
    lowest, highest = torch.aminmax(labels)
    if lowest >= 0 and highest <= 1:  # one pass for what is usual; NaN takes the other way
        return
    allowed = (labels >= 0) & (labels <= 1)
    if labels.dtype.is_signed:  # torch takes an unsigned 255 for -1
        allowed |= labels == -1
    wrong = labels[~allowed]
    if wrong.numel() > 0:
        values = ", ".join(f"{value:g}" for value in wrong.double().unique()[:5].tolist())
        raise ValueError(f"labels: expected values in [0, 1] or -1 (ignored), got {values}")


def check_positive(name: str, value: Tensor) -> None:
    """Require a tensor's one value finite and > 0, where values are checked and it has one."""
    if reads_values(value) and holds_values(value):
        number = value.item()
        if not 0.0 < number < float("inf"):
            raise ValueError(f"{name}: expected a finite number > 0, got {number:g}")


def positive_number(name: str, value: object) -> float:
    """Return a finite number > 0 (numpy's scalars are numbers too) as a float."""
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number > 0, got {type(value).__name__}")
    number = float(value)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return number


def as_temperature(value: float | Tensor, like: Tensor, name: str = "temperature") -> Tensor:
    """Return ``value`` as a 0-d tensor of the accumulation dtype on ``like``'s device.

    It must be finite and > 0. A GPU tensor is taken as it is, for reading it would make the host wait, and so is one
    under a compiler (backends that run on a CPU check it then).
    """
    dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
        check_real(name, value)
        check_same_device(name, value, "features", like)
        check_positive(name, value)
        return value.reshape(()).to(dtype)
    return torch.full((), positive_number(name, value), dtype=dtype, device=like.device)
