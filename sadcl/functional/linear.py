"""A linear layer as a function, by the faster of two float32 products.

Why: torch's fp32 product is MKL's, which on AMD processors with AVX-512 reaches 70 to 90 % of ours (a Zen 4,
docs/benchmark_notes.md, also for why it is not oneDNN's). Which one runs is decided by the processor alone, and by
``SADCL_LINEAR``:

- ``auto`` (default): ours on AMD processors with AVX-512, torch's everywhere else. On a Zen 3 (AVX2) both reach the
  same speed within 10 %, so torch's stays there.
- ``cpp`` or ``torch``: that one. A program that torch.export or torch.jit makes has torch's unless ``cpp`` says so.

Ours takes CPU float32 and float64; other tensors, and everything under autocast or with forward-mode derivatives, go to
torch. Precision is never lowered.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import backends, cpp_is_outnumbered, makes_program
from .._checks import check_choice, check_devices, forward_mode
from ..ops import linear as _linear
from ..ops._native import extension

SWITCH = "SADCL_LINEAR"


def _probe() -> bool:
    """Whether this is an AMD processor whose AVX-512 our kernels use, by as many threads as torch."""
    if not backends()["cpp"].available or cpp_is_outnumbered() or not extension().isa().startswith("avx512"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


CPP = backends()["cpp"]
OURS_IS_FASTER = _probe()  # when this module loads: a call under torch.compile only reads it


def _chosen() -> str:
    asked = check_choice(SWITCH, os.environ.get(SWITCH) or "auto", ("auto", "cpp", "torch"))
    if asked == "auto":
        return "cpp" if OURS_IS_FASTER and not makes_program() else "torch"
    if asked == "cpp" and not CPP.available:
        raise RuntimeError(f"{SWITCH}='cpp': {CPP.reason}")
    return asked


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` by the faster of two float32 products.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: if they are on several devices.
    """
    check_devices(x=x, weight=weight, bias=bias)
    given = [t for t in (x, weight, bias) if t is not None]
    fits = x.dtype in (torch.float32, torch.float64) and x.dim() > 0 and weight.dim() == 2
    fits = fits and all(t.dtype == x.dtype and t.device.type == "cpu" and t.layout == torch.strided for t in given)
    empty = 0 in x.shape or 0 in weight.shape
    if not fits or empty or forward_mode() or torch.is_autocast_enabled("cpu") or _chosen() == "torch":
        return F.linear(x, weight, bias)
    rows = _linear.linear(_linear.Inputs(x.reshape(-1, x.shape[-1]), weight, bias), "cpp").out
    return rows.view(*x.shape[:-1], weight.shape[0])
