"""Launching through the driver's own interface, and a record of launches for tests and scripts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _cache, _nvrtc

_SHARED = 48 << 10  # what a block may have without being asked for


@dataclass(frozen=True)
class Part:
    """What a launcher has to know of a GPU: its name for compilers, multiprocessors, shared memory of a block."""

    arch: str
    processors: int
    shared_bytes: int


# Data-sheet figures, for compiling without the device: A100, H100, B200, RTX 5090.
PARTS = {
    "sm_80": Part("sm_80", 108, 163 << 10),
    "sm_90": Part("sm_90", 132, 227 << 10),
    "sm_100": Part("sm_100", 148, 227 << 10),
    "sm_120": Part("sm_120", 170, 99 << 10),
}


@dataclass(frozen=True)
class Program:
    """A kernel of a source, compiled with some defines.

    ``KERNEL_<kernel>`` is defined too, so that the other kernels of the source are not compiled.
    """

    source: str
    kernel: str
    defines: Mapping[str, object] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.source, self.kernel, *self.defines.items()))

    def compiled(self, target: str) -> bytes:
        """Cubin or PTX, see :func:`._nvrtc.compile_source`; from the disk if it is there."""
        return _cache.compiled(self.source, {f"KERNEL_{self.kernel}": 1, **self.defines}, target)

    @property
    def label(self) -> str:
        """The kernel with its defines, to read."""
        return " ".join([self.kernel, *(f"{key}={value}" for key, value in self.defines.items())])


@dataclass(frozen=True)
class Launch:
    """One launch as the recorder saw it."""

    program: Program
    grid: int
    threads: int
    shared: int
    args: tuple[Any, ...]
    cooperative: bool

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.program.kernel


@dataclass
class _Recorder:
    launches: Any  # has append()
    part: Part | None


_recorders: list[_Recorder] = []


@contextlib.contextmanager
def recording(part: Part | None = None, into: Any = None) -> Iterator[Any]:
    """Collect the launches made inside the block; with ``part``, pretend to be on it and run nothing.

    Tensors may then be on any device, meta too. ``into`` takes each launch by its ``append``, as it is made.
    """
    recorder = _Recorder([] if into is None else into, part)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


def launch(
    program: Program,
    *,
    grid: int,
    threads: int,
    args: tuple[Any, ...],
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Run ``grid`` blocks of ``threads`` threads on the device of the first tensor, on torch's stream of it.

    Args:
        program: what to run.
        grid: blocks; none launches nothing.
        threads: of a block, as the kernel's ``__launch_bounds__`` says.
        args: tensors or None (pointers), ints (``int64_t``), floats (``double``), tuples of ints (structs of
            ``int64_t``), in the kernel's order.
        shared: bytes of dynamic shared memory of a block.
        cooperative: all blocks run at once (see :func:`blocks_that_fit`), so they may wait for each other.
    """
    if grid == 0:
        return
    for recorder in _recorders:
        recorder.launches.append(Launch(program, grid, threads, shared, args, cooperative))
    if any(recorder.part is not None for recorder in _recorders):
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with _on(device.index):
        function = _function(program, device.index, shared)
        packed, addresses = pack(args)
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        sizes = (grid, 1, 1, threads, 1, 1, shared, stream, addresses)
        if cooperative:
            _check(driver().cuLaunchCooperativeKernel(function, *sizes), f"launch of {program.label}")
        else:
            _check(driver().cuLaunchKernel(function, *sizes, None), f"launch of {program.label}")
    del packed  # the driver has copied it


@contextlib.contextmanager
def _on(index: int) -> Iterator[None]:
    """Inside, a device is torch's and its context the driver's: a thread of autograd's may not have met one yet."""
    with torch.cuda.device(index):
        context = ctypes.c_void_p()
        _check(driver().cuCtxGetCurrent(ctypes.byref(context)), "context")
        if context.value is None:
            _check(driver().cuCtxSetCurrent(_primary(index)), f"context of device {index}")
        yield


@functools.cache
def _primary(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses; kept for as long as the process lives."""
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver().cuDeviceGet(ctypes.byref(ordinal), index), f"device {index}")
    _check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal), f"context of device {index}")
    return context


def pack(args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Arguments as the driver wants them: their bytes one after another, and where each begins."""
    form, values, offsets = "<", list[Any](), list[int]()
    for arg in args:
        offsets.append(8 * len(values))
        if isinstance(arg, tuple):
            form += "q" * len(arg)
            values += arg
        elif isinstance(arg, float):
            form += "d"
            values.append(arg)
        elif isinstance(arg, int):
            form += "q"
            values.append(arg)
        else:
            form += "Q"
            values.append(0 if arg is None else arg.data_ptr())
    buffer = ctypes.create_string_buffer(struct.pack(form, *values), max(1, 8 * len(values)))
    base = ctypes.addressof(buffer)
    return buffer, (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))


def part_of(device: torch.device) -> Part:
    """The part behind ``device``.

    Raises:
        RuntimeError: it is older than sm_80.
    """
    for recorder in reversed(_recorders):
        if recorder.part is not None:
            return recorder.part
    return _probe(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _probe(index: int) -> Part:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    _nvrtc.target_of(capability)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Part(f"sm_{capability}", properties.multi_processor_count, shared)


def blocks_that_fit(program: Program, threads: int, shared: int, device: torch.device) -> int:
    """How many blocks run at once: what a cooperative launch can have; one a multiprocessor where nothing is run."""
    part = part_of(device)
    if any(recorder.part is not None for recorder in _recorders):
        return part.processors
    index = device.index if device.index is not None else torch.cuda.current_device()
    return part.processors * _blocks_of(program, threads, shared, index)


@functools.cache
def _blocks_of(program: Program, threads: int, shared: int, index: int) -> int:
    with _on(index):
        count = ctypes.c_int()
        function = _function(program, index, shared)
        _check(
            driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(count), function, threads, ctypes.c_size_t(shared)
            ),
            f"occupancy of {program.label}",
        )
    return count.value


_counters: dict[Any, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 ``[64]``, zero when it is made: what blocks meet at; whoever uses it leaves zeros behind.

    One a stream, on which kernels run one after another; a captured graph has its own, zeroed by the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(64, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(64, dtype=torch.int32, device=device)
    return _counters[key]


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library, which torch has loaded already.

    Raises:
        RuntimeError: it cannot be loaded.
    """
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"backend='cuda': the driver's library cannot be loaded: {error}") from error


_functions: dict[tuple[Program, int, int], ctypes.c_void_p] = {}
_loading = threading.Lock()


def _function(program: Program, index: int, shared: int) -> ctypes.c_void_p:
    """The kernel on a device whose context is current, loaded once, allowed its shared memory."""
    key = (program, index, shared)
    found = _functions.get(key)
    if found is not None:
        return found
    with _loading:
        function = _module(program, index)
        if shared > _SHARED:
            code = driver().cuFuncSetAttribute(function, 8, shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(code, f"{shared} bytes of shared memory for {program.label}")
        _functions[key] = function
    return function


@functools.cache
def _module(program: Program, index: int) -> ctypes.c_void_p:
    image = program.compiled(_nvrtc.target_of(int(_probe(index).arch[3:])))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver().cuModuleLoadData(ctypes.byref(module), image + b"\0"), f"loading of {program.label}")
    _check(driver().cuModuleGetFunction(ctypes.byref(function), module, program.kernel.encode()), program.label)
    return function


def _check(code: int, what: str) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"backend='cuda': {what}: {(text.value or b'unknown error').decode()} ({code})")
