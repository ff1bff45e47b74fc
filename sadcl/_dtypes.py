"""Which dtypes there are, and in which one a number is kept."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REAL = (*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


_NOTHING = contextlib.nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and losses are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_dtype(device: torch.device) -> torch.dtype:
    """Norms are float64, so that 1e30 and subnormal features work, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> Any:
    """A context in which autocast rounds nothing; some devices ("meta") have no autocast."""
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
