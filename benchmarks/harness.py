"""Timing that can be believed on a shared machine: interleaved rounds, medians, and the floor measured beside them."""

from __future__ import annotations

import ctypes
import gc
import importlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sadcl


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one entry: median, fastest and slowest of the rounds."""

    median: float
    fastest: float
    slowest: float


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
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One training step's share: value and gradients of the floating inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second that ``copy_`` moves (read + write), all threads."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]
    return 2 * source.numel() * 4 / (timing.fastest * 1e-3)


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


def fma_peak() -> float:
    """Float32 FLOP/s of independent FMAs in registers, all threads, on the instruction set in use; 0 without C++."""
    if not sadcl.backends()["cpp"].available:
        return 0.0
    return float(importlib.import_module("sadcl._C").fma_peak(torch.get_num_threads()))


def print_table(title: str, timings: dict[str, Timing], ours: str, floor_ms: float | None = None) -> None:
    """Print medians, spread, and the ratio of every entry to ours."""
    print(f"\n{title}")
    print(f"  {'':28s} {'median':>10s} {'fastest':>10s} {'slowest':>10s}   {'/ ours':>8s}")
    for name, t in sorted(timings.items(), key=lambda item: -item[1].median):
        ratio = t.median / timings[ours].median
        print(f"  {name:28s} {t.median:8.2f}ms {t.fastest:8.2f}ms {t.slowest:8.2f}ms   {ratio:7.2f}x")
    if floor_ms is not None:
        print(f"  {'floor':28s} {floor_ms:8.2f}ms {'':23s}   {floor_ms / timings[ours].median:7.2f}x")


def machine() -> str:
    """Where the numbers come from, and what the machine could do at that moment."""
    cpp = sadcl.backends()["cpp"]
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"cpp: {cpp.detail or cpp.reason}\n"
        f"in this run: float32 FMA peak {fma_peak() / 1e9:.0f} GFLOP/s, copy {copy_bandwidth() / 1e9:.0f} GB/s"
    )
