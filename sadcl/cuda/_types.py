"""torch's dtypes by the names that the sources know."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


def type_of(tensor: Tensor) -> str:
    """The type of a tensor's elements, as a source names it."""
    return _NAMES[tensor.dtype]
