"""Which dtype a number is kept in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and losses are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_dtype(device: torch.device) -> torch.dtype:
    """Norms are float64, so that 1e30 and subnormal features work, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
