"""Losses over the ranks of a process group: bytes that a rank sends, memory, and time, counted against their formulas.

Processes of one thread on this machine's cores, gloo. Bytes are counted by a wrapper around the two collectives, and
have to be the formula's. Time is wall time and CPU time of the slowest rank; more ranks than cores wait for each other.
``python -m benchmarks.bench_group computed`` prints the tables of docs/scaling.md for ranks that are not here.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import harness
from sadcl import _collectives
from sadcl import functional as F
from sadcl.portable.group_sweep import _BLOCK_ELEMENTS
from sadcl.testing import make_features, make_labels

HEADER = 8 * _collectives._HEADER
ROUNDS = 5
BLOCK = _BLOCK_ELEMENTS["cpu"]


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


def peak_bytes(size: Size, features: int, ring: bool = False) -> int:
    """The highest memory of a step on a CPU over its inputs, to a few megabytes.

    What all ranks sent, or in the ring own vectors, those that travel and those that come; own unit vectors and their
    gradient; that of the ``features`` (bytes). Beside that a block of columns in float64 while it is normalised, with
    its scores, or in the end the own rows' gradient in float64.
    """
    numbers = size.rows * size.d
    columns = min(BLOCK // size.rows, BLOCK // size.d) * min(size.rows, BLOCK)
    block = 24 * min(BLOCK, size.world * numbers) + 28 * columns
    held = (size.vectors if ring else size.world * size.vectors) + 8 * numbers + features
    return held + max(block + (2 * size.vectors if ring else 0), 24 * numbers)


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


def measure(loss: Callable[[Tensor], Tensor], x: Tensor, rounds: int) -> dict[str, Any]:
    """Bytes of a step's two halves, its time, its memory."""
    leaf = x.clone().requires_grad_()
    with counted() as sent:
        value = loss(leaf)
        forward = sent["bytes"]
        value.backward()
        answer: dict[str, Any] = {"forward": forward, "backward": sent["bytes"] - forward, "calls": sent["calls"]}
    wall, cpu = [], []
    for _ in range(rounds):
        leaf.grad = None
        dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        loss(leaf).backward()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    leaf.grad = None
    dist.barrier()
    answer["memory"] = harness.peak_memory(lambda: loss(leaf).backward())
    answer["wall"], answer["cpu"] = statistics.median(wall), statistics.median(cpu)
    return answer


def coco_rank(rank: int, world: int, images: int, ring: bool) -> dict[str, Any]:
    """SSCL of a global batch of ``images`` at COCO's size, dealt out evenly."""
    c, d, own = 80, 1024, images // world
    x = make_features(own, 2, c, d, seed=rank)
    labels = make_labels(images, c)[rank * own : (rank + 1) * own]
    pairs = torch.tensor([int(labels.sum())])
    dist.all_reduce(pairs, dist.ReduceOp.MAX)
    size = Size(world, 2 * int(pairs), d, int(pairs), 4)
    answer = measure(lambda x: F.sample_contrastive_loss(x, labels, group="world", ring=ring), x, ROUNDS)
    return {**answer, "size": size, "features": 4 * x.numel()}


def wide_rank(rank: int, world: int, rows: int, ring: bool) -> dict[str, Any]:
    """SupCon over enough rows that their memory is seen."""
    d, own = 8192, rows // world
    x = torch.nn.functional.normalize(make_features(own, 1, d, seed=rank), dim=-1)
    labels = torch.arange(own) % 100
    answer = measure(lambda x: F.supcon_loss(x, labels, group="world", ring=ring), x, 1)
    return {**answer, "size": Size(world, own, d, own, 8), "features": 4 * x.numel()}


def _process(rank: int, world: int, port: int, cases: list[Any], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    queue.put((rank, [function(rank, world, *args) for function, *args in cases]))
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
    print(harness.machine())
    print("| ranks | loss | sent, counted | sent, formula | peak, measured | peak, formula | wall | CPU |")
    print("|---|---|---|---|---|---|---|---|")
    sys.stdout.flush()
    for world in (1, 2, 4):
        cases = [(coco_rank, 128, False), (coco_rank, 128, True), (wide_rank, 1024, False), (wide_rank, 1024, True)]
        for (function, images, ring), answers in zip(cases, over_ranks(world, cases), strict=True):
            _row(world, f"{function.__name__.removesuffix('_rank')} {images}{', ring' if ring else ''}", answers, ring)


def _row(world: int, name: str, answers: list[dict[str, Any]], ring: bool) -> None:
    size, features = answers[0]["size"], answers[0]["features"]
    sent = max(one["forward"] + one["backward"] for one in answers)
    formula = sum(bytes_sent(size, ring).values())
    memory = max(one["memory"] for one in answers) / 1e6
    peak = f"{peak_bytes(size, features, ring) / 1e6:.0f} MB" if world > 1 else "(another path)"
    wall, cpu = (1e3 * max(one[key] for one in answers) for key in ("wall", "cpu"))
    print(f"| {world} | {name} | {sent:,} | {formula:,} | {memory:.0f} MB | {peak} | {wall:.0f} ms | {cpu:.0f} ms |")


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
