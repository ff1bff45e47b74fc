"""The memory bank: for every batch position and class, the last label feature that was recognised there."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_devices, check_floating, check_tensor
from ._own import OwnTensors
from .functional.bank import bank_update


class MemoryBank(OwnTensors):
    """A tensor ``slots [B_slot, C, E]``, one slot per batch position, per process.

    Filled with the prototypes at the start. Where ``labels[b, c] = 1`` and ``sigmoid(logits[b, c]) >
    threshold``, an update writes ``slots[b, c] = label_features[b, c]``, detached. A batch smaller than
    B_slot uses the first slots. The bank differs between processes by design: it is in the state dict, but no
    buffer, so that DistributedDataParallel leaves every process its own, however deep it sits in other modules.

    A state dict of another number of slots (a run with another batch size) loads: its first slots where it has
    more, all of them over and over where it has fewer.

    Args:
        batch_slots: B_slot, the batch size of one process.
        num_classes: C.
        embed_dim: E.
    """

    own = ("slots",)
    slots: Tensor

    def __init__(self, batch_slots: int, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        if min(batch_slots, num_classes, embed_dim) < 1:
            raise ValueError(
                f"expected sizes >= 1, got batch_slots={batch_slots}, num_classes={num_classes}, embed_dim={embed_dim}"
            )
        self.slots = torch.zeros(batch_slots, num_classes, embed_dim)

    @property
    def batch_slots(self) -> int:
        """B_slot, the largest batch the bank serves."""
        return self.slots.shape[0]

    @torch.no_grad()
    def fill(self, prototypes: Tensor) -> None:
        """Set every slot to the prototypes ``[C, E]``."""
        if prototypes.shape != self.slots.shape[1:]:
            raise ValueError(f"prototypes: expected [C, E]={list(self.slots.shape[1:])}, got {list(prototypes.shape)}")
        self.slots.copy_(prototypes.detach().expand_as(self.slots))

    def read(self, batch: int) -> Tensor:
        """A copy of the first ``batch`` slots, ``[batch, C, E]``.

        It is a copy because a step updates the bank between its forward and its backward, and the backward
        of the projection needs what the forward saw.

        Raises:
            ValueError: if ``batch`` exceeds the number of slots.
        """
        self._check_batch(batch)
        return self.slots[:batch].clone()

    @torch.no_grad()
    def update(
        self,
        label_features: Tensor,
        scores: Tensor,
        labels: Tensor,
        threshold: float = 0.8,
        *,
        probabilities: bool = False,
    ) -> None:
        """Write the confidently and correctly recognised label features.

        No loop over labels in Python and nothing read back from the device.

        Args:
            label_features: h ``[B, C, E]``, before the projection.
            scores: logits ``[B, C]``, or probabilities if so said.
            labels: ``[B, C]``; 1 is positive, 0 and -1 (ignored) write nothing.
            threshold: probability that must be exceeded.
            probabilities: whether ``scores`` are probabilities already.

        Raises:
            ValueError: if shapes or devices do not fit or B exceeds the number of slots.
        """
        check_floating("label_features", check_tensor("label_features", label_features, (3,), "[B, C, E]"))
        batch = label_features.shape[0]
        self._check_batch(batch)
        if label_features.shape[1:] != self.slots.shape[1:]:
            raise ValueError(
                f"label_features: expected [B, C, E] with [C, E]={list(self.slots.shape[1:])}, "
                f"got {list(label_features.shape)}"
            )
        for name, value in (("scores", scores), ("labels", labels)):
            check_tensor(name, value, (2,), "[B, C]")
            if value.shape != label_features.shape[:2]:
                raise ValueError(
                    f"{name}: expected [B, C]={list(label_features.shape[:2])} as in label_features, "
                    f"got {list(value.shape)}"
                )
        check_devices(slots=self.slots, label_features=label_features, scores=scores, labels=labels)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold: expected a probability, got {threshold}")
        bank_update(self.slots, label_features, scores, labels, threshold, probabilities)

    def fit(self, name: str, given: Tensor) -> Tensor:
        """The slots of a state dict as this bank's number of them."""
        if given.dim() == 0 or len(given) in (0, self.batch_slots):
            return given
        return given[torch.arange(self.batch_slots, device=given.device) % len(given)]

    def extra_repr(self) -> str:
        """Sizes shown by print()."""
        return "batch_slots={}, num_classes={}, embed_dim={}".format(*self.slots.shape)

    def _check_batch(self, batch: int) -> None:
        if batch > self.batch_slots:
            raise ValueError(
                f"batch of {batch} images: the memory bank has {self.batch_slots} slots; call init_contrastive with "
                "batch_slots >= the batch size of one process, or the model with contrastive=False"
            )
