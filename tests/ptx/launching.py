"""Ops of ours on CPU tensors, every launch executed as compiled for sm_80."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sadcl.kernels import _launch
from torch import Tensor

from benchmarks.launches import Job, job_of
from sadcl import _backends

from .ptxemu import Kernel, Result

ARCH = "sm_80"
CACHE = Path(os.environ.get("PTXEMU_CACHE") or Path(__file__).parent / "__pycache__") / "ptx"


@dataclass(frozen=True)
class Compiled:
    """PTX and bytes of shared memory."""

    ptx: str
    shared: int


def compiled(job: Job) -> Compiled:
    """Made once: kept in a folder that git ignores."""
    kept = CACHE / f"{job.fingerprint()}.ptx"
    if not kept.exists():
        made = compile_job(job)
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}")
        scratch.write_text(f"// {made.shared} bytes of shared memory\n{made.ptx}")
        scratch.replace(kept)
    head, ptx = kept.read_text().split("\n", 1)
    return Compiled(ptx, int(head.split()[1]))


def compile_job(job: Job) -> Compiled:
    """As far as PTX: what ptxas makes of it is not executed, and takes longer than all else."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", int(ARCH[3:]), 32)
    backend = make_backend(target)
    source = ASTSource(job.kernel, signature=job.signature, constexprs=job.constants, attrs=job.attributes)
    asked = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": _launch.FP_FUSION}
    options = backend.parse_options({**asked, **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
                            context)  # fmt: skip
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for stage in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[stage](module, metadata)
    if metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
        raise NotImplementedError(f"{job.name} needs scratch memory")
    return Compiled(module, metadata["shared"])


def arguments(launch: Any, job: Job) -> list[Any]:
    """What is passed at run time: tuples flat, constants left out, then the two scratch pointers."""
    found: list[Any] = []

    def walk(value: Any, path: tuple[int, ...]) -> None:
        if isinstance(value, tuple):
            for index, part in enumerate(value):
                walk(part, (*path, index))
        elif path not in job.constants:
            found.append(value)

    for parameter, value in zip(launch.kernel.params, launch.args, strict=False):
        walk(value, (parameter.num,))
    return [*found, None, None]


@dataclass
class Executor:
    """Executes launches as they are made.

    Attributes:
        options: of :func:`ptxemu.run`.
        edit: what is done to the program of a kernel before it is executed; by default nothing.
        results: what each launch did, with the kernel's name.
    """

    options: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[str, Kernel], Kernel] = lambda name, kernel: kernel
    results: list[tuple[str, Result]] = field(default_factory=list)
    fresh: list[tuple[Tensor, np.ndarray, int]] = field(default_factory=list)

    def append(self, launch: Any) -> None:
        """Execute a launch: what the recorder of launches calls."""
        job = job_of(launch, ARCH, "")
        kernel, shared = kernel_of(job)
        kernel = self.edit(launch.name, kernel)
        for tensor, known, version in self.fresh:
            if tensor._version != version:  # torch wrote into it
                known[:] = 1
        result = kernel(
            launch.programs, arguments(launch, job), shared=shared,
            uninitialised=[(tensor, known) for tensor, known, _ in self.fresh], **self.options,
        )  # fmt: skip
        self.results.append((launch.name, result))

    def require_written(self, tensors: Iterable[Tensor]) -> None:
        """Raise an AssertionError where a tensor that was allocated here has bytes that nobody wrote."""
        known = {tensor.data_ptr(): (mask, tensor._version == version) for tensor, mask, version in self.fresh}
        for number, tensor in enumerate(tensors):
            mask, by_launches = known.get(tensor.data_ptr(), (None, False))
            if by_launches and mask is not None:
                assert mask[: tensor.numel() * tensor.element_size()].all(), f"tensor {number} is not written in full"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what torch allocates without filling it holds no value until a launch, or torch, writes into it."""

        def watched(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any, **kwargs: Any) -> Tensor:
                made = allocate(*args, **kwargs)
                if made.device.type == "cpu" and made.numel() > 0 and made.is_contiguous():
                    known = np.zeros(made.numel() * made.element_size(), np.uint8)
                    self.fresh.append((made.detach(), known, made._version))
                return made

            return run

        with contextlib.ExitStack() as stack:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
            yield


_kernels: dict[tuple[object, ...], tuple[Kernel, int]] = {}


def kernel_of(job: Job) -> tuple[Kernel, int]:
    """The compiled kernel of a job and its shared memory; made once."""
    key = (job.module, job.name, job.version())
    if key not in _kernels:
        made = compiled(job)
        _kernels[key] = Kernel(made.ptx), made.shared
    return _kernels[key]


@contextlib.contextmanager
def executing(executor: Executor | None = None, processors: int | None = None) -> Iterator[Executor]:
    """Inside, the Triton backend takes CPU tensors, and its launches are executed.

    ``processors`` makes the part smaller than it is, so that few programs share much work.
    """
    executor = executor or Executor()
    part = _launch.PARTS[ARCH]
    part = part if processors is None else replace(part, processors=processors)
    recorder = _launch._Recorder(executor, part)  # type: ignore[arg-type]
    with mock.patch.object(_backends, "triton_interprets", lambda: True), executor.watching():
        _launch._recorders.append(recorder)
        try:
            yield executor
        finally:
            _launch._recorders.remove(recorder)
