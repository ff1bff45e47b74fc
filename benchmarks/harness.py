"""Timing that can be believed on a shared machine: interleaved rounds, medians, and the floor measured beside them."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sadcl


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one entry: median, fastest and slowest of the rounds, and all of them in their order."""

    median: float
    fastest: float
    slowest: float
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))


def interleave(
    entries: dict[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 3,
    slow: float = 0.5,
    slow_every: int = 5,
) -> dict[str, Timing]:
    """Time every entry once a round, round after round, so that a drift of the machine meets all of them alike.

    In each round an entry runs untimed and then timed: it meets its own pages in the allocator, as in a training loop,
    not those of the entry before it. (A neighbour that frees 100 MB makes malloc return it to the system, and whoever
    comes next pays 2 to 6 microseconds a page: PSCL once read 21 ms after such a neighbour, and 3 ms after itself.)

    Args:
        entries: what to run, by name.
        rounds: rounds to keep.
        warmup: rounds to drop (compilation, page faults, caches).
        slow: an entry that takes longer than this many seconds runs in some rounds only; beyond 5 s, only timed.
        slow_every: in every round whose number this divides.
    """
    samples: dict[str, list[float]] = {name: [] for name in entries}
    last = dict.fromkeys(entries, 0.0)
    for number in range(-warmup, rounds):
        if RECORD.quick and number >= 3 and sum(last.values()) > 2:
            break
        for name, run in entries.items():
            if last[name] > slow and number > -warmup and number % slow_every:
                continue
            if last[name] < 5:
                run()
            start = time.perf_counter()
            run()
            last[name] = time.perf_counter() - start
            if number >= 0:
                samples[name].append(1e3 * last[name])
    return {name: Timing.of(s) for name, s in samples.items()}


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One training step's share: value and gradients of the floating inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def copy_bandwidth(traffic: float = 512 << 20) -> float:
    """Bytes a second that ``copy_`` moves, all threads, where ``traffic`` bytes are read and written in all.

    Measured once a size (to a factor of 1.2) and process. What fits into a cache is copied there, several times as fast
    as memory is: a floor by the bandwidth of memory would be no floor.
    """
    return _copy_bandwidth(round(math.log(max(traffic, 1 << 16), 1.2)))


@functools.cache
def _copy_bandwidth(size: int) -> float:
    elements = int(1.2**size / 8)
    source, target = torch.ones(elements), torch.empty(elements)
    repeats = max(1, (16 << 20) // elements)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 8 * elements * repeats / (interleave({"copy": copies}, rounds=5)["copy"].fastest * 1e-3)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which ``run`` raises the process's resident memory at its highest (Linux; our C++ scratch included)."""
    run()  # code, thread pools and caches that stay
    _trim()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return _status("VmHWM") - before


def _trim() -> None:
    """Give what malloc keeps back to the system, so that it is counted when it is used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def bfloat16_rate() -> float:
    """FLOP/s of torch's own bfloat16 product, [1568, 2048] by [2048, 2048]: best of 5."""
    x, weight = torch.ones(1568, 2048, dtype=torch.bfloat16), torch.ones(2048, 2048, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2.0 * 1568 * 2048 * 2048 / best


def fma_peak() -> float:
    """Float32 FLOP/s of independent FMAs in registers, all threads, on the instruction set in use; 0 without C++."""
    if not sadcl.backends()["cpp"].available:
        return 0.0
    return float(importlib.import_module("sadcl._C").fma_peak(torch.get_num_threads()))


@dataclass(frozen=True)
class Row:
    """One piece of work, measured: what ``--report`` draws and ``benchmarks.compare`` compares.

    Attributes:
        name: bench and case, the same in every run: ``"sscl coco"``.
        about: shape, dtype, what is timed.
        timings: by entry; ``"sadcl"`` is ours.
        peak_mb: memory beyond the inputs, by entry; empty where it was not measured.
        flops: of our form; None where bytes are what is counted.
        traffic: bytes to and from memory at least; None where they do not bound it.
        floor_ms: the longer of both at the rates measured beside; None where neither was counted.
        bound: ``"FMA peak"``, ``"bfloat16 products"`` or ``"copy bandwidth"``.
    """

    name: str
    about: str
    timings: dict[str, Timing]
    peak_mb: dict[str, float]
    flops: float | None = None
    traffic: float | None = None
    floor_ms: float | None = None
    bound: str = ""


@dataclass(frozen=True)
class Series:
    """A table of numbers over something that grows."""

    name: str
    about: str
    columns: tuple[str, ...]
    lines: list[tuple[float, ...]]


@dataclass
class Record:
    """What this process measured so far; peak memory is measured where somebody will look at it."""

    rows: list[Row] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    memory: bool = False
    quick: bool = False  # at most 3 rounds where one takes longer than 2 s


RECORD = Record()


def compare(
    name: str,
    about: str,
    entries: dict[str, Callable[[], object]],
    flops: float | None = None,
    traffic: float | None = None,
    peak: float | None = None,
    **how: Any,
) -> Row:
    """Interleave the entries, measure the floor beside them, print the table, and keep it in :data:`RECORD`.

    Args:
        name: bench and case; the key under which runs are compared.
        about: shape, dtype, what is timed.
        entries: what to run; ``"sadcl"`` is ours.
        flops: floating point operations of our form.
        peak: FLOP/s that ``flops`` can go at, if not float32's.
        traffic: bytes that have to be read and written; their floor is a copy of as many, in the cache if they fit.
        how: for :func:`interleave`.
    """
    if not RECORD.rows:
        print(machine())
    timings = interleave(entries, **how)
    rate, limit = (fma_peak(), "FMA peak") if peak is None else (peak, "bfloat16 products")
    floors = {}
    if flops is not None and rate:
        floors[limit] = 1e3 * flops / rate
    if traffic is not None:
        floors["copy bandwidth"] = 1e3 * traffic / copy_bandwidth(traffic)
    bound = max(floors, key=lambda key: floors[key], default="")
    memory = {key: peak_memory(run) / 1e6 for key, run in entries.items()} if RECORD.memory else {}
    row = Row(name, about, timings, memory, flops, traffic, floors.get(bound), bound)
    RECORD.rows.append(row)
    print_row(row)
    return row


def print_row(row: Row, ours: str = "sadcl") -> None:
    """Medians, spread, the ratio of every entry to ours, memory, and the floor."""
    base = row.timings[ours].median
    print(f"\n{row.name}: {row.about}")
    if row.flops is not None:
        print(f"  {row.flops / 1e9:.3g} GFLOP of our form, {row.flops / base / 1e6:.0f} GFLOP/s")
    print(
        f"  {'':28s} {'median':>10s} {'fastest':>10s} {'slowest':>10s}   {'/ ours':>8s} {'MB' if row.peak_mb else ''}"
    )
    for name, t in sorted(row.timings.items(), key=lambda item: -item[1].median):
        memory = f"{row.peak_mb[name]:9.1f}" if name in row.peak_mb else ""
        times = f"{t.median:8.2f}ms {t.fastest:8.2f}ms {t.slowest:8.2f}ms"
        print(f"  {name:28s} {times}   {t.median / base:7.2f}x {memory}")
    if row.floor_ms is not None:
        print(
            f"  {f'floor ({row.bound})':28s} {row.floor_ms:8.2f}ms {'':23s}   {row.floor_ms / base:7.2f}x", flush=True
        )


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """Where the numbers come from, and what the machine could do at that moment."""
    cpp = sadcl.backends()["cpp"]
    return (
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"cpp: {cpp.detail or cpp.reason}\n"
        f"in this run: float32 FMA peak {fma_peak() / 1e9:.0f} GFLOP/s, copy {copy_bandwidth() / 1e9:.0f} GB/s"
    )
