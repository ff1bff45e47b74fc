"""Op ``compact``: multi-hot labels to class-major pairs and class pointers (CSR), once for all losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..portable import compact as portable
from ._library import Op
from ._native import cuda_kernel, native, triton_kernel


class Inputs(NamedTuple):
    """What is compacted."""

    labels: Tensor  # [B, C] of any real dtype
    capacity: int | None  # entries of `pairs`; None, as what is larger: all B * C


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


def allocate(x: Inputs) -> Active:
    """Uninitialised outputs."""
    b, c = x.labels.shape
    size = b * c if x.capacity is None else torch.sym_min(x.capacity, b * c)
    return Active(
        pairs=x.labels.new_empty(size, dtype=torch.int32),
        class_ptr=x.labels.new_empty(c + 1, dtype=torch.int32),
        target=x.labels.new_empty((b, c), dtype=torch.int8),
    )


def _bounded(run: Callable[[Any, Any], None]) -> Callable[[Inputs], Active]:
    """``run`` into buffers for all pairs, of which ``capacity`` are passed on."""

    def bounded(x: Inputs) -> Active:
        labels, capacity = x
        out = allocate(Inputs(labels, None))
        run(Inputs(labels, labels.numel()), out)
        if capacity is None or capacity >= labels.numel():
            return out
        if _checks.reads_values(labels) and out.class_ptr[-1] > capacity:
            raise ValueError(f"capacity: the labels have {out.class_ptr[-1].item()} active pairs, more than {capacity}")
        return out._replace(pairs=out.pairs[:capacity])

    return bounded


_compact = Op(
    "compact",
    Inputs,
    Active,
    allocate,
    {
        "cpp": _bounded(native("compact")),
        "triton": _bounded(triton_kernel("compact", "compact")),
        "cuda": _bounded(cuda_kernel("compact", "compact")),
        "torch": _bounded(portable.compact),
    },
)

BACKENDS = _compact.backends


def compact(labels: Tensor, capacity: int | None, backend: str) -> Active:
    """Run the op on ``labels [B, C]``."""
    return _compact(Inputs(labels, capacity), backend)
