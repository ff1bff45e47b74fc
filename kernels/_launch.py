"""Launching: which part a device is, how many programs fill it, and a record of launches for tests and scripts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Part:
    """What a launcher has to know of a GPU.

    Attributes:
        arch: ``"sm_90"``, ``"gfx942"``, or ``"interpret"``.
        processors: multiprocessors (compute units).
        shared_bytes: shared memory that one program can have.
        name: of the device, for the autotuner's cache.
    """

    arch: str
    processors: int
    shared_bytes: int
    name: str = ""


# Data-sheet figures, for compiling without the device.
PARTS = {
    "sm_75": Part("sm_75", 40, 64 << 10, "T4"),
    "sm_80": Part("sm_80", 108, 163 << 10, "A100"),
    "sm_86": Part("sm_86", 84, 99 << 10, "A40"),
    "sm_89": Part("sm_89", 142, 99 << 10, "L40S"),
    "sm_90": Part("sm_90", 132, 227 << 10, "H100"),
    "sm_100": Part("sm_100", 148, 227 << 10, "B200"),
    "gfx942": Part("gfx942", 304, 64 << 10, "MI300X"),
    # A few programs, so that the work split and the persistent loops are exercised.
    "interpret": Part("interpret", 4, 64 << 10),
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the recorder saw it."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return str(self.kernel.__name__)


# Products and sums may become FMAs, as in the C++ kernels. Named because Triton 3.10 changes its default.
FP_FUSION = True


@dataclass
class _Recorder:
    launches: list[Launch]
    part: Part | None


_recorders: list[_Recorder] = []


@contextlib.contextmanager
def recording(part: Part | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; with ``part``, pretend to be on it and run nothing.

    Tensors may then be on the meta device: this is how ``benchmarks/gpu_static.py`` learns what to compile.
    """
    recorder = _Recorder([], part)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


def launch(
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its first argument.

    ``registers`` bounds what a thread takes on an NVIDIA part. Without a bound, ptxas aims at one more program on a
    multiprocessor, and spills a few bytes to get there.
    """
    if programs == 0:
        return
    for recorder in _recorders:
        recorder.launches.append(Launch(kernel, programs, args, constants, num_warps, num_stages, registers))
    if any(recorder.part is not None for recorder in _recorders):
        return
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    device = first.device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if registers is not None and device.type == "cuda" and not torch.version.hip:
        constants = {**constants, "maxnreg": registers}
    with guard:
        kernel[(programs,)](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=FP_FUSION, **constants)


def part_of(device: torch.device) -> Part:
    """The part behind ``device``; raises where Triton cannot serve it."""
    for recorder in reversed(_recorders):
        if recorder.part is not None:
            return recorder.part
    if INTERPRET:
        return PARTS["interpret"]
    return _probe(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _probe(index: int) -> Part:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, shared = properties.gcnArchName.split(":")[0], 64 << 10
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        if (properties.major, properties.minor) < (7, 5):
            raise RuntimeError(f"backend='triton': {properties.name} is {arch}, older than the sm_75 that Triton needs")
        shared = properties.shared_memory_per_block_optin
    return Part(arch, properties.multi_processor_count, shared, properties.name)


def require_dtype(part: Part, dtype: torch.dtype) -> None:
    """Raise a RuntimeError that names the reason where a part has no arithmetic for ``dtype``."""
    if dtype == torch.bfloat16 and part.arch == "sm_75":
        raise RuntimeError("backend='triton': bfloat16 needs sm_80 or later, this GPU is sm_75; use float16")


def capped(part: Part, blocks: int, per_processor: int = 4) -> int:
    """Programs for ``blocks`` pieces of work that a grid-stride loop shares out."""
    return max(1, min(blocks, part.processors * per_processor))


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
