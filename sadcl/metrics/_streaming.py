"""The report over batches that arrive one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadcl.metrics._inputs import Array, Threshold, canonical
from sadcl.metrics._report import MultilabelReport, Protocol, report_of


class MultilabelAccumulator:
    """Collects scores and labels batch by batch on the CPU; :meth:`compute` equals one call over them all.

    Storage doubles when it is full, so n images cost O(n) copies. Half precision is kept as float32, a
    float64 batch makes the storage float64. A call that raises leaves the accumulator as it was.

    Args:
        threshold, ap, cf1, absent: as :func:`multilabel_report`.
        num_classes: C; None takes it from the first batch.
    """

    def __init__(
        self,
        threshold: Threshold = 0.5,
        ap: str = "voc_area",
        cf1: str = "macro",
        absent: str = "skip",
        num_classes: int | None = None,
    ) -> None:
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
            raise ValueError(f"num_classes: expected an int >= 1 or None, got {num_classes!r}")
        self.protocol = Protocol.make(threshold, ap, cf1, absent)
        if num_classes is not None:
            self.protocol.check_classes(num_classes)
        self._given_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget every image and free the storage."""
        self._size = 0
        width = self._given_classes or 0
        self._scores = torch.empty(0, width, device="cpu")
        self._target = torch.empty(0, width, dtype=torch.int8, device="cpu")

    def __len__(self) -> int:
        return self._size

    @property
    def num_classes(self) -> int | None:
        """C, or None while neither the constructor nor a batch has said."""
        return self._target.shape[1] or None

    @property
    def scores(self) -> Tensor:
        """[n, C] what was collected so far, float32 or float64 (a view)."""
        return self._scores[: self._size]

    @property
    def labels(self) -> Tensor:
        """[n, C] int8 in {-1, 0, 1}, a view."""
        return self._target[: self._size]

    def update(self, scores: Array, labels: Array) -> None:
        """Add a batch, checked here, detached and copied to the CPU.

        Args:
            scores, labels: [b, C], as :func:`multilabel_report`; b may be 0.

        Raises:
            TypeError, ValueError: as :func:`multilabel_report`; also another C than before.
        """
        self._append(*canonical(scores, labels, dims=(2,)))

    def merge(self, other: MultilabelAccumulator) -> None:
        """Append another accumulator's images after this one's; ``other`` is left as it is.

        The order of merging decides ties in ``"voc_area"`` and ``"voc11"``, and nothing else.
        """
        if not isinstance(other, MultilabelAccumulator):
            raise TypeError(f"other: expected a MultilabelAccumulator, got {type(other).__name__}")
        if other.protocol != self.protocol:
            raise ValueError(f"other: expected the protocol {self.protocol!r}, got {other.protocol!r}")
        if other.num_classes is not None:
            self._append(other.scores, other.labels)

    def compute(self) -> MultilabelReport:
        """The report over every image so far.

        Raises:
            ValueError: there was no batch and no ``num_classes``.
        """
        if self.num_classes is None:
            raise ValueError("compute: expected an update() first, or num_classes in the constructor; got neither")
        return report_of(self.scores, self.labels, self.protocol)

    def _append(self, scores: Tensor, target: Tensor) -> None:
        num_classes = self.num_classes or target.shape[1]
        if target.shape[1] != num_classes:
            raise ValueError(f"scores: expected C={num_classes} as before, got shape {tuple(scores.shape)}")
        self.protocol.check_classes(num_classes)
        start, stop = self._size, self._size + target.shape[0]
        dtype = torch.promote_types(self._scores.dtype, scores.dtype)
        capacity = self._target.shape[0]
        if stop > capacity or dtype != self._scores.dtype or not self.num_classes:
            capacity = max(2 * capacity, stop) if stop > capacity else capacity
            grown = torch.empty(capacity, num_classes, dtype=dtype, device="cpu")
            grown_target = torch.empty(capacity, num_classes, dtype=torch.int8, device="cpu")
            if start:
                grown[:start], grown_target[:start] = self.scores, self.labels
            self._scores, self._target = grown, grown_target
        self._scores[start:stop] = scores
        self._target[start:stop] = target
        self._size = stop

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the images only, not the spare capacity: what travels between processes."""
        return {**vars(self), "_scores": self.scores.clone(), "_target": self.labels.clone()}
