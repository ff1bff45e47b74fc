"""Several processes, one a GPU, started by ``torchrun``: who trains on what, and what they tell each other.

``torchrun --nproc_per_node=2 -m sadcl.train ...`` runs the same code in every process. In a single process every
function here does nothing. What the processes tell each other, gradients apart, are values on the CPU (gloo).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sadcl.metrics import MultilabelAccumulator

__all__ = [
    "BatchShard",
    "PeerLost",
    "everyone",
    "gather",
    "gather_scores",
    "is_main",
    "joined",
    "main_first",
    "own_peaks",
    "parallel",
    "rank",
    "run_device",
    "share",
    "synchronised",
    "wait",
    "world",
]

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the main process alone computes feature maps and draws; the others wait


class PeerLost(ConnectionError):
    """Another process of the group has stopped; it has said why."""


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and speaks to people."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started: gloo between CPUs, nccl between GPUs.

    A process that fails leaves at once, without a word to the others, who may be waiting for it: they notice
    (:class:`PeerLost`), or torchrun stops them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine needs a GPU of its own, and there are {count}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
        wait()
    except RuntimeError as error:
        if any(word in str(error) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")):
            raise PeerLost(f"process {rank()} of {world()} stops: another one did, and said why") from error
        raise
    dist.destroy_process_group()


def run_device() -> torch.device:
    """The device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if world() == 1 else torch.device("cuda", torch.cuda.current_device())


def gather(value: T) -> list[T]:
    """What every process has given, in their order; in every process. Tensors must be on the CPU."""
    values: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """What the main process has given."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def everyone(agrees: bool) -> bool:
    """Whether ``agrees`` is true in every process."""
    if world() == 1:
        return agrees
    flag = torch.tensor(int(agrees), device="cpu")
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def wait() -> None:
    """Go on when every process is here."""
    everyone(True)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others: what it leaves on disk, they find."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def parallel(forward: Any, device: torch.device) -> Any:
    """A module whose backward averages the gradients over the processes; in one process the module itself.

    Weights and buffers are made equal to the main process's; every process keeps its own memory bank, which is no
    buffer.
    """
    if world() == 1:
        return forward
    return _Parallel(forward, [device.index] if device.type == "cuda" else None)


class _Parallel(DistributedDataParallel):
    """DDP that knows how large this process's own gradients were: after the average all processes have the same."""

    def __init__(self, module: Any, devices: list[int] | None) -> None:
        super().__init__(module, devices)
        self.peaks: dict[int, torch.Tensor] = {}  # of a bucket of gradients: the largest magnitude
        self.register_comm_hook(None, lambda _, bucket: self._average(bucket))

    def _average(self, bucket: Any) -> Any:
        """DDP's own average of a bucket over the processes; notes the numbers of this one before."""
        own = bucket.buffer()
        self.peaks[bucket.index()] = torch.linalg.vector_norm(own, float("inf"))
        own.mul_(1 / world())
        return dist.all_reduce(own, async_op=True).get_future().then(lambda done: done.value()[0])


def own_peaks(forward: Any, averaged: bool) -> list[torch.Tensor]:
    """Largest magnitudes of this process's part of the gradient, if the last backward averaged it; else nothing."""
    return list(forward.peaks.values()) if isinstance(forward, _Parallel) and averaged else []


def synchronised(forward: Any, now: bool) -> AbstractContextManager[Any]:
    """Around a forward: whether its backward averages the gradients, or leaves them to that of a later batch."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) and not now else nullcontext()


class BatchShard(list[list[int]]):
    """The batches of item numbers that this process takes of a pass over ``count`` items, each taken by one process.

    Whole batches are dealt out, not items: an item meets the same others as in a single process, so its scores are
    the same to the last bit.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        first, step = rank() * batch_size, world() * batch_size
        super().__init__(list(range(i, min(i + batch_size, count))) for i in range(first, count, step))


def gather_scores(seen: MultilabelAccumulator, shard: BatchShard) -> None:
    """Put the scores and labels of all processes into ``seen``, in the order of the items; in every process."""
    if world() == 1:
        return
    parts = [part for part in gather((list(chain(*shard)), seen.scores, seen.labels)) if part[0]]
    items, scores, labels = zip(*parts, strict=True)
    order = torch.tensor(list(chain(*items)), device="cpu").argsort()
    seen.reset()
    seen.update(torch.cat(scores)[order], torch.cat(labels)[order])
