"""A ring of keys with their labels, for contrast with more images than a batch holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check


class KeyQueue(nn.Module):
    """The last ``size`` keys and their labels: columns for :class:`MultiLabelSupConLoss` (MoCo's queue).

    Keys are kept detached, in the buffer's dtype (``queue.to(...)`` changes it), their labels as int8 (-1 allowed). All
    of it is part of the state dict, so a run goes on bit for bit. How many there are, and where the next one goes, are
    Python ints in the module's extra state: nothing waits for a device.

    Worked example, size 3: after ``enqueue`` of a, b the keys are a, b; after c, d they are d, b, c (d took a's place).
    The order of keys means nothing to a loss.

    Args:
        size: keys it holds, > 0.
        dim: their width.
        num_classes: columns of their labels.
    """

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
        self.register_buffer("ring", torch.zeros(size, dim))
        self.register_buffer("ring_labels", torch.zeros(size, num_classes, dtype=torch.int8))
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
    def enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Add keys, in place of the oldest; of more than ``size`` the last are kept.

        Call it after the backward of a loss that took :attr:`keys`: autograd notices that they were written to.

        Args:
            keys: ``[K, dim]`` floating.
            labels: ``[K, num_classes]``, any real dtype: 1, 0 or -1 (ignored).

        Raises:
            TypeError: wrong types or dtypes.
            ValueError: wrong ranks, sizes, devices or label values.
        """
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
        keys, labels = keys.detach()[-self.size :], labels[-self.size :]
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
