"""Op ``compact``: multi-hot labels to class-major pairs and class pointers (CSR), once for all losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ._library import DTYPE_CODES, array, call, extension, implemented, register, triton_kernel


class Active(NamedTuple):
    """The active (image, class) pairs of a batch, class by class, in buffers whose size depends on B and C only.

    Example, ``B = 3``, ``C = 2``::

        labels = [[1, 0],        pairs     = [0, 2, 4, 0, 0, 0]     b * C + c: class 0 in images 0 and 1, class 1 in 2
                  [1, 0],        class_ptr = [0, 2, 3]              class c owns pairs[class_ptr[c]:class_ptr[c+1]]
                  [-1, 1]]       target    = [[1, 0], [1, 0], [-1, 1]]

    The count of pairs is ``class_ptr[-1]``; the rest of ``pairs`` is 0. No shape depends on the data, so nothing has to
    be read back from the device.

    A caller who knows a bound on the active pairs gives it as ``capacity``: what the losses allocate follows it. More
    pairs than that is a ValueError on a CPU (and with ``SADCL_CHECK=1``); on a GPU, where nothing is read back, the
    losses become NaN and :attr:`overflowed` says why.

    Attributes:
        pairs: int32 ``[B * C]``, or ``[capacity]``.
        class_ptr: int32 ``[C + 1]``.
        target: int8 ``[B, C]``; 1 active, 0 not, -1 ignored.
    """

    pairs: Tensor
    class_ptr: Tensor
    target: Tensor

    @property
    def overflowed(self) -> Tensor:
        """0-d bool: more active pairs than the caller's capacity, which the losses answer with NaN."""
        return self.class_ptr[-1] > self.pairs.shape[0]


def _cpp(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if labels.dtype not in DTYPE_CODES:
        labels = labels.float()
    pairs, class_ptr, target = _empty(labels)
    extension().compact(array(labels), array(pairs), array(class_ptr), array(target))
    return pairs, class_ptr, target


def _torch(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if _checks.reads_values(labels):
        _checks.check_label_values(labels)
    b, c = labels.shape
    target = labels.to(torch.int8).contiguous()
    active = (target == 1).t().contiguous()  # [C, B]
    class_ptr = torch.zeros(c + 1, dtype=torch.int32, device=labels.device)
    class_ptr[1:] = active.sum(dim=1).cumsum(0)
    flat = active.flatten()
    # Inactive pairs all land in one spare slot behind the buffer: no shape depends on the data.
    slot = torch.where(flat, flat.cumsum(0) - 1, b * c)
    pair = torch.arange(b * c, dtype=torch.int32, device=labels.device).reshape(b, c).t().flatten()
    pairs = torch.zeros(b * c + 1, dtype=torch.int32, device=labels.device)
    pairs.scatter_(0, slot, torch.where(flat, pair, 0))
    return pairs[:-1].clone(), class_ptr, target


def _empty(labels: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, c = labels.shape
    return (
        labels.new_empty(b * c if capacity is None else min(capacity, b * c), dtype=torch.int32),
        labels.new_empty(c + 1, dtype=torch.int32),
        labels.new_empty((b, c), dtype=torch.int8),
    )


def _bounded(implementation: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """The pairs of ``implementation``, no more than ``capacity`` of them."""

    def run(labels: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        pairs, class_ptr, target = implementation(labels)
        if capacity >= labels.numel():
            return pairs, class_ptr, target
        if _checks.reads_values(labels) and class_ptr[-1] > capacity:
            raise ValueError(f"capacity: the labels have {class_ptr[-1].item()} active pairs, more than {capacity}")
        return pairs[:capacity], class_ptr, target

    return run


_IMPLEMENTATIONS = {
    "cpp": _bounded(_cpp),
    "triton": _bounded(triton_kernel("compact", "compact")),
    "torch": _bounded(_torch),
}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "compact",
    "(Tensor labels, int capacity, str backend) -> (Tensor, Tensor, Tensor)",
    _IMPLEMENTATIONS,
    lambda labels, capacity, backend: _empty(labels, capacity),
)


def compact(labels: Tensor, capacity: int | None, backend: str) -> Active:
    """Run the op on ``labels [B, C]``."""
    return Active(*call("compact", labels, labels.numel() if capacity is None else capacity, backend))
