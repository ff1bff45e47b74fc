"""Ops of ours on CPU tensors by the backend "cuda": every launch executed as NVRTC compiles it for sm_80."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from sadcl import _backends
from sadcl.cuda import _launch

from .launching import Executor
from .ptxemu import Kernel

ARCH = "sm_80"


@functools.cache
def kernel_of(program: _launch.Program) -> Kernel:
    """A program for sm_80; compiled once a process, kept on the disk as a GPU's programs are."""
    return Kernel(program.compiled(f"compute_{ARCH[3:]}").decode())


@dataclass
class CudaExecutor(Executor):
    """Executes launches as they are made."""

    def append(self, launch: Any) -> None:
        """Execute a launch: what the recorder of launches calls."""
        kernel = self.edit(launch.name, kernel_of(launch.program))
        assert launch.threads == kernel.program.threads, f"{launch.name}: threads are not those of __launch_bounds__"
        for tensor, known, version in self.fresh:
            if tensor._version != version:  # torch wrote into it
                known[:] = 1
        result = kernel(
            launch.grid, list(launch.args), shared=launch.shared,
            uninitialised=[(tensor, known) for tensor, known, _ in self.fresh], **self.options,
        )  # fmt: skip
        self.results.append((launch.name, result))


@contextlib.contextmanager
def executing_cuda(executor: Executor | None = None, processors: int | None = None) -> Iterator[Executor]:
    """Inside, the backend "cuda" takes CPU tensors, and its launches are executed.

    ``processors`` makes the part smaller than it is, so that few blocks share much work.
    """
    executor = executor or CudaExecutor()
    part = _launch.PARTS[ARCH]
    part = part if processors is None else replace(part, processors=processors)
    with (
        mock.patch.object(_backends, "_CUDA_DEVICES", ("cuda", "meta", "cpu")),
        executor.watching(),
        _launch.recording(part, executor),
    ):
        yield executor
