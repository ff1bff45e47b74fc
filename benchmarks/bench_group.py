"""Losses over the ranks of a process group: bytes that a rank sends, memory, and time, counted against their formulas.

Processes of one thread on this machine's cores, gloo. Bytes are counted by a wrapper around the two collectives, and
have to be the formula's. Time is wall time and CPU time of the slowest rank; more ranks than cores wait for each other.
``python -m benchmarks.bench_group docs/scaling.md`` prints the table of what is measured there and puts it in the old
one's place, with ``computed`` for an argument it prints the other one, for ranks that are not here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import harness
from sadcl import _collectives
from sadcl import functional as F
from sadcl.portable.group_fused import _FEW as FEW
from sadcl.portable.group_fused import _PART as PART
from sadcl.portable.group_sweep import _BLOCK_ELEMENTS
from sadcl.testing import make_features, make_labels

HEADER = 8 * _collectives._HEADER
ROUNDS = 5
BLOCK = _BLOCK_ELEMENTS["cpu"]
SMALL_CHUNKS = False  # memory is measured after the times

HEAD = (
    "| ranks | loss | sent, counted | sent, formula | peak, measured | peak, formula | wall | CPU | CPU, torch |",
    "|---|---|---|---|---|---|---|---|---|",
)


class Size(NamedTuple):
    """What a rank brings: ``rows`` vectors of ``d`` numbers of ``width`` bytes, ``items`` with ``tag`` bytes each."""

    world: int
    rows: int
    d: int
    items: int
    tag: int
    width: int = 4

    @property
    def vectors(self) -> int:
        """Bytes of a rank's vectors."""
        return self.rows * self.d * self.width


def bytes_sent(size: Size, ring: bool = False) -> dict[str, int]:
    """What a rank sends in a forward and in a backward: to each of the others once, whatever the algorithm."""
    others = size.world - 1
    tags = size.items * size.tag
    piece = (tags + (0 if ring else size.vectors) + 15) // 16 * 16
    forward = HEADER + piece + (size.vectors if ring else 0)
    backward = 16 * size.rows + (size.vectors if ring else 0)
    return {"forward": others * forward, "backward": others * backward}


def pscl_bytes_sent(world: int, classes: int) -> dict[str, int]:
    """The same of PSCL: three float64 numbers a class and a count, then an upstream number a class."""
    return {"forward": (world - 1) * (HEADER + 4 * 8 * classes), "backward": (world - 1) * 4 * classes}


def peak_bytes(size: Size, ring: bool, normalized: bool) -> int:
    """The highest memory of a step on a CPU over its inputs, without the collectives' own buffers.

    Held: what all ranks sent, or in the ring what travels; own vectors, where they are not the features themselves.
    While the backward's kernel runs: own rows and a part of the columns as panels of float32, the own rows' gradient as
    panels and as rows. At its end: that gradient and the features' (of which a system holds what is not zero), and
    where vectors are normalised own unit vectors, the gradient of own vectors and a block in float64.
    """
    numbers = size.rows * size.d
    own = size.vectors if size.rows > size.items else 0
    part = size.rows if ring or size.rows >= FEW else min(2 * FEW, size.world * size.rows)
    kernel = 0 if ring or size.rows >= FEW else size.width * size.d * part  # a copy: a part is of several ranks
    kernel += 4 * size.d * (size.rows + min(PART, part)) + 8 * numbers + (size.vectors if ring else 0)
    end = (4 + size.width) * numbers
    if normalized:
        end += end + 28 * min(BLOCK, numbers)
    return own + (0 if ring else size.world * size.vectors) + max(kernel, end)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts bytes that leave this process in the collectives of our ops."""
    sent = {"bytes": 0, "calls": 0}
    gather, exchange = _collectives._gather, _collectives._exchange

    def counting_gather(flat: Tensor, group: Any) -> Tensor:
        sent["bytes"] += (group.world - 1) * flat.numel() * flat.element_size()
        sent["calls"] += 1
        return gather(flat, group)

    def counting_exchange(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        row = x.numel() // max(x.shape[0], 1) * x.element_size()
        sent["bytes"] += row * sum(count for rank, count in enumerate(send) if rank != group.rank)
        sent["calls"] += 1
        return exchange(x, send, receive, group)

    _collectives._gather, _collectives._exchange = counting_gather, counting_exchange
    try:
        yield sent
    finally:
        _collectives._gather, _collectives._exchange = gather, exchange


def measure(loss: Callable[..., Tensor], x: Tensor, rounds: int) -> dict[str, Any]:
    """Bytes of a step's two halves, its time, with ``backend="torch"`` too in turn, its memory (`SMALL_CHUNKS`)."""
    leaf = x.clone().requires_grad_()
    if SMALL_CHUNKS:
        return {"memory": harness.peak_memory(lambda: _step(loss, leaf, None))}
    with counted() as sent:
        value = loss(leaf)
        forward = sent["bytes"]
        value.backward()
        answer: dict[str, Any] = {"forward": forward, "backward": sent["bytes"] - forward, "calls": sent["calls"]}
    times: dict[str, list[float]] = {"wall": [], "cpu": [], "cpu of torch": [], "": []}
    _step(loss, leaf, "torch")
    for _ in range(rounds):
        for backend, wall, cpu in ((None, "wall", "cpu"), ("torch", "", "cpu of torch")):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            _step(loss, leaf, backend)
            times[wall].append(time.perf_counter() - started)
            times[cpu].append(time.process_time() - used)
    return {**answer, **{name: statistics.median(all_of) for name, all_of in times.items() if name}}


def _step(loss: Callable[..., Tensor], leaf: Tensor, backend: str | None) -> None:
    leaf.grad = None
    dist.barrier()
    loss(leaf, backend=backend).backward()


def coco_rank(rank: int, world: int, images: int, ring: bool) -> dict[str, Any]:
    """SSCL of a global batch of ``images`` at COCO's size, dealt out evenly."""
    c, d, own = 80, 1024, images // world
    x = make_features(own, 2, c, d, seed=rank)
    labels = make_labels(images, c)[rank * own : (rank + 1) * own]
    pairs = torch.tensor([int(labels.sum())])
    dist.all_reduce(pairs, dist.ReduceOp.MAX)
    size = Size(world, 2 * int(pairs), d, int(pairs), 4)
    loss = functools.partial(F.sample_contrastive_loss, labels=labels, group="world", ring=ring)
    answer = measure(loss, x, ROUNDS)
    return {**answer, "size": size}


def wide_rank(rank: int, world: int, rows: int, ring: bool) -> dict[str, Any]:
    """SupCon over enough rows that their memory is seen."""
    d, own = 8192, rows // world
    x = torch.nn.functional.normalize(make_features(own, 1, d, seed=rank), dim=-1)
    labels = torch.arange(own) % 100
    answer = measure(functools.partial(F.supcon_loss, labels=labels, group="world", ring=ring), x, 1)
    return {**answer, "size": Size(world, own, d, own, 8)}


def _return_large_chunks() -> None:
    """Have malloc give large chunks back as soon as they are freed, so that the resident set is what is in use."""
    global SMALL_CHUNKS
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    SMALL_CHUNKS = True


def _process(rank: int, world: int, port: int, cases: list[Any], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    answers = [function(rank, world, *args) for function, *args in cases]
    _return_large_chunks()
    queue.put(
        (rank, [one | function(rank, world, *args) for one, (function, *args) in zip(answers, cases, strict=True)])
    )
    dist.destroy_process_group()


def over_ranks(world: int, cases: list[Any]) -> list[list[dict[str, Any]]]:
    """Call ``function(rank, world, *args)`` of every case in ``world`` processes: answers by case, then by rank."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    processes = mp.start_processes(_process, (world, port, cases, queue), world, join=False, start_method="spawn")
    answers = dict(queue.get() for _ in range(world))
    processes.join()
    return [[answers[rank][number] for rank in range(world)] for number in range(len(cases))]


def main() -> None:
    if sys.argv[1:] == ["computed"]:
        computed()
        return
    table = [*HEAD]
    print(harness.machine())
    print("\n".join(HEAD), flush=True)
    for world in (1, 2, 4):
        cases = [(coco_rank, 128, False), (coco_rank, 128, True), (wide_rank, 1024, False), (wide_rank, 1024, True)]
        for (function, images, ring), answers in zip(cases, over_ranks(world, cases), strict=True):
            table.append(
                _row(
                    world,
                    f"{function.__name__.removesuffix('_rank')} {images}{', ring' if ring else ''}",
                    answers,
                    ring,
                )
            )
            print(table[-1], flush=True)
    for path in map(Path, sys.argv[1:]):
        text, found = re.subn(re.escape(HEAD[0]) + r"(\n\|.*)*", "\n".join(table), path.read_text())
        if found != 1:
            raise ValueError(f"{path}: expected one table that begins with {HEAD[0]!r}, found {found}")
        path.write_text(text)


def _row(world: int, name: str, answers: list[dict[str, Any]], ring: bool) -> str:
    size = answers[0]["size"]
    sent = max(one["forward"] + one["backward"] for one in answers)
    formula = sum(bytes_sent(size, ring).values())
    memory = max(one["memory"] for one in answers) / 1e6
    peak = f"{peak_bytes(size, ring, name.startswith('coco')) / 1e6:.0f} MB" if world > 1 else "(another path)"
    times = " | ".join(f"{1e3 * max(one[key] for one in answers):.0f} ms" for key in ("wall", "cpu", "cpu of torch"))
    return f"| {world} | {name} | {sent:,} | {formula:,} | {memory:.0f} MB | {peak} | {times} |"


# What leaves a GPU in a second, in bytes (docs/scaling.md has the sources), and its arithmetic.
NVLINK, INFINIBAND, FLOPS = 450e9, 50e9, 6.7e13


def computed() -> None:
    """Bytes, time and memory of ranks that are not here: 32 images a rank, two views, 190 active rows, float32."""
    print("| GPUs | rows N | sent, SSCL | over NVLink | over InfiniBand | products | gathered | ring | PSCL sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for world in (2, 8, 64, 1024):
        for rows in (190, 4096):
            size = Size(world, rows, 1024, rows // 2, 4)
            sent = sum(bytes_sent(size).values())
            work = 3 * 2 * rows * rows * world * size.d / FLOPS
            pscl = sum(pscl_bytes_sent(world, 80).values())
            fast = f"{1e3 * sent / NVLINK:.2f} ms" if world <= 8 else "-"
            print(
                f"| {world} | {rows * world:,} | {sent / 1e6:,.1f} MB | {fast} | {1e3 * sent / INFINIBAND:,.2f} ms "
                f"| {1e3 * work:,.2f} ms | {size.vectors * world / 1e6:,.0f} MB | {3 * size.vectors / 1e6:,.1f} MB "
                f"| {pscl / 1e3:,.0f} kB |"
            )


if __name__ == "__main__":
    main()
