"""What a resumed run has to find again: the order of the images, and the state of every random generator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler

__all__ = ["ShuffledBatches", "rng_state", "seed_everything", "set_rng_state"]


class ShuffledBatches(Sampler[list[int]]):
    """A new seeded shuffle every epoch, cut into batches, that can begin in the middle of an epoch.

    Batches that were already used are skipped as numbers: no picture is decoded for them.

    Several processes deal one shuffle out among them. Each takes as many images, so up to ``world - 1`` images,
    others in every epoch, wait for the next one.

    Args:
        count: number of images.
        batch_size: images a batch of one process; the last batch of an epoch may be smaller.
        seed: of the order.
        rank: which of the processes this one is.
        world: number of processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if count < world:
            raise ValueError(f"{count} training images: expected at least one for each of {world} processes")
        self.images, self.batch_size = count, batch_size
        self.rank, self.world = rank, world
        self.count = count // world  # images of this process in an epoch
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0  # the epoch that runs, or the next one
        self.batch = 0  # batches of it that training has finished with
        self._epoch_start = self.generator.get_state()

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the epoch that training has not finished with yet."""
        self.generator.set_state(self._epoch_start)
        # The number DataLoader draws for its workers. Drawn here, so that the order is the same with any workers.
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self.generator)
        shuffled = list(RandomSampler(range(self.images), generator=self.generator))
        mine = shuffled[self.rank : self.count * self.world : self.world]
        yield from islice(BatchSampler(mine, self.batch_size, drop_last=False), self.batch, None)

    def finish_epoch(self) -> None:
        """Go on to the next epoch; call it when the last batch has been used."""
        self.epoch, self.batch = self.epoch + 1, 0
        self._epoch_start = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Where in which order training is."""
        return {"epoch": self.epoch, "batch": self.batch, "generator": self._epoch_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._epoch_start = state["generator"]


def seed_everything(seed: int) -> None:
    """Start the random generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The global random generators of torch (every GPU's too), numpy and Python, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    keys = np.asarray(keys)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
