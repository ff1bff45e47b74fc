"""A ring of keys with their labels, for contrast with more images than a batch holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._collectives import Group, all_gather, meet, refuse
from .._groups import GroupLike, find_group
from .._own import OwnTensors


class KeyQueue(OwnTensors):
    """The last ``size`` keys and their labels: columns for :class:`MultiLabelSupConLoss` (MoCo's queue).

    Keys are kept detached, in the ring's dtype (``queue.to(...)`` changes it), their labels as int8 (-1 allowed). All
    of it is part of the state dict, so a run goes on bit for bit. How many there are, and where the next one goes, are
    Python ints in the module's extra state: nothing waits for a device. The ring is no buffer, so that
    DistributedDataParallel does not send it round: with ``enqueue(group=)`` it is the same on every rank anyway.

    Worked example, size 3: after ``enqueue`` of a, b the keys are a, b; after c, d they are d, b, c (d took a's place).
    The order of keys means nothing to a loss.

    Args:
        size: keys it holds, > 0.
        dim: their width.
        num_classes: columns of their labels.
    """

    own = ("ring", "ring_labels")
    ring: Tensor
    ring_labels: Tensor

    def __init__(self, size: int, dim: int, num_classes: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer > 0, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected an integer > 0, got {value}")
        self.size, self.dim, self.num_classes = size, dim, num_classes
        self.ring = torch.zeros(size, dim)
        self.ring_labels = torch.zeros(size, num_classes, dtype=torch.int8)
        self.filled, self.next = 0, 0

    @property
    def keys(self) -> Tensor:
        """``[filled, dim]``; a view of the ring, which the next :meth:`enqueue` writes into."""
        return self.ring[: self.filled]

    @property
    def labels(self) -> Tensor:
        """``[filled, num_classes]`` int8."""
        return self.ring_labels[: self.filled]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor, *, group: GroupLike = None) -> None:
        """Add keys, in place of the oldest; of more than ``size`` the last are kept.

        Call it after the backward of a loss that took :attr:`keys`: autograd notices that they were written to.

        Args:
            keys: ``[K, dim]`` floating.
            labels: ``[K, num_classes]``, any real dtype: 1, 0 or -1 (ignored).
            group: ``"world"``, a ProcessGroup or a DeviceMesh of one dimension, all of whose ranks call this: the keys
                of all are added, in rank order, on every rank. K may differ between them, and be 0.

        Raises:
            TypeError: wrong types or dtypes.
            ValueError: wrong ranks, sizes, devices or label values; with a group on every rank alike.
        """
        over = find_group(group)
        if over is None or over.world == 1:
            self._check(keys, labels)
        else:
            try:
                self._check(keys, labels)
            except (TypeError, ValueError) as error:
                refuse(error, self.ring.device, over)
            same = f"loss=KeyQueue; size={self.size}; dim={self.dim}; num_classes={self.num_classes}"
            same += f"; filled={self.filled}; next={self.next}; dtype={keys.dtype}"
            keys, labels = self._of_all(keys.detach(), labels, same, over)
        self._add(keys.detach()[-self.size :], labels[-self.size :])

    def _check(self, keys: Tensor, labels: Tensor) -> None:
        check.check_tensor("keys", keys, (2,), "[K, dim]")
        check.check_floating("keys", keys)
        check.check_size("keys", keys, 1, self.dim, "dim", "the queue")
        check.check_tensor("labels", labels, (2,), "[K, num_classes]")
        check.check_real("labels", labels)
        check.check_size("labels", labels, 0, keys.shape[0], "K", "keys")
        check.check_size("labels", labels, 1, self.num_classes, "num_classes", "the queue")
        check.check_same_device("keys", keys, "the queue", self.ring)
        check.check_same_device("labels", labels, "the queue", self.ring)
        if check.reads_values(labels):
            check.check_label_values(labels)

    def _of_all(self, keys: Tensor, labels: Tensor, same: str, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and labels of all ranks, of each no more than the ring holds."""
        keys, labels = keys[-self.size :], labels[-self.size :].to(torch.int8)
        number = keys.shape[0]
        counts = meet(same, number, number, 0, keys.new_ones((), dtype=torch.float32), 0, True, group).counts or []
        parts = []
        for mine in (keys, labels):
            room = mine.new_zeros(max(counts), mine.shape[1])
            room[:number] = mine
            everyone = all_gather(room, group)
            parts.append(torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)]))
        return parts[0], parts[1]

    def _add(self, keys: Tensor, labels: Tensor) -> None:
        count = keys.shape[0]
        before_end = min(count, self.size - self.next)
        for ring, new in ((self.ring, keys), (self.ring_labels, labels)):
            ring[self.next : self.next + before_end].copy_(new[:before_end])
            ring[: count - before_end].copy_(new[before_end:])
        self.next = (self.next + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def get_extra_state(self) -> dict[str, int]:
        """How many keys there are, and where the next one goes."""
        return {"filled": self.filled, "next": self.next}

    def set_extra_state(self, state: Any) -> None:
        """The reverse.

        Raises:
            ValueError: if this is not the state of a queue of this size.
        """
        filled, position = state["filled"], state["next"]
        if not (0 <= filled <= self.size and 0 <= position < self.size):
            raise ValueError(f"KeyQueue: expected the state of a queue of {self.size} keys, got {state}")
        self.filled, self.next = filled, position

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, num_classes={self.num_classes}, filled={self.filled}"
