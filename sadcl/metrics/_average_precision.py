"""Average precision: one sort of all classes, and after it work on the positives alone.

On a CPU the extension ranks class by class (csrc/average_precision.cpp); what follows is for other devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sadcl._backends import takes_cpp
from sadcl._checks import check_choice
from sadcl.metrics._inputs import Array, canonical
from sadcl.ops import average_precision as _cpu

AP_METHODS = ("voc_area", "sklearn", "voc11")
_BLOCK = 1 << 24  # pairs sorted at a time: bounds the int64 order to 128 MiB however many classes there are


def average_precision(scores: Array, labels: Array, method: str = "voc_area") -> Tensor | float:
    """Average precision of each class.

    Rank the images of a class by falling score; precision_k = (positives among the first k) / k, where only
    images whose label is not ignored count.

    - ``"voc_area"``: the mean over positives of the largest precision at or after the positive's place: the
      area under the interpolated curve. Each image is its own threshold, ties rank in input order.
    - ``"voc11"``: the same curve read at recall 0, 0.1, ..., 1 and averaged; "recall >= k/10" is exact.
    - ``"sklearn"``: the mean over positives of the precision at the end of the positive's group of equal
      scores, not interpolated: the step sum of ``sklearn.metrics.average_precision_score``.

    Args:
        scores: [n, C] or [n], floating point, logits or probabilities; +-inf is ranked, NaN is an error.
        labels: the same shape; 1, 0 or -1 (ignored), bool, integer or float.
        method: the protocol.

    Returns:
        [C] float64 on the device of ``scores`` (on the CPU if that is neither CPU nor CUDA), or a float for
        1-D inputs. A class without positives is NaN in every method (scikit-learn says 0 there).

    Raises:
        TypeError: neither tensors nor arrays, scores not floating point, labels not real.
        ValueError: shapes, label values, NaN scores, devices, or an unknown method.
    """
    check_choice("method", method, AP_METHODS)
    scores, target = canonical(scores, labels, dims=(1, 2))
    if scores.dim() == 1:
        return float(class_ap(scores[:, None], target[:, None], method))
    return class_ap(scores, target, method)


def class_ap(scores: Tensor, target: Tensor, method: str) -> Tensor:
    """[C] float64 AP of checked ``scores`` [n, C] and ``target`` [n, C], in blocks of whole classes."""
    if takes_cpp(scores.device):
        return _cpu.average_precision(scores, target, method)
    step = max(1, _BLOCK // max(1, scores.shape[0]))
    blocks = zip(scores.split(step, dim=1), target.split(step, dim=1), strict=True)
    return torch.cat([_block_ap(s.t().contiguous(), t.t().contiguous(), method) for s, t in blocks])


def _block_ap(scores: Tensor, target: Tensor, method: str) -> Tensor:
    """[C] float64 AP from ``scores`` [C, n] and ``target`` [C, n]."""
    values, order = torch.sort(scores, dim=1, descending=True, stable=True)
    hits = _Hits.of(target.gather(1, order))
    if hits.width == 0:
        return torch.full_like(hits.total, math.nan, dtype=torch.float64)
    if method == "sklearn":
        return hits.table(_tied_precision(values, hits), 0.0).sum(1) / hits.total
    # Between two positives precision only falls, so the positives' own precisions give the envelope: the
    # running maximum from the last positive to the first, with the zeros of the padding in front.
    precision = hits.number.double() / hits.seen(hits.place)
    envelope = hits.table(precision, 0.0, reverse=True).cummax(1).values
    if method == "voc_area":
        return envelope.sum(1) / hits.total
    # Recall reaches k/10 with positive number ceil(k * total / 10); the maximum at recall >= 0 is number 1's.
    tenths = torch.arange(11, device=scores.device)
    number = ((tenths * hits.total[:, None] + 9) // 10).clamp(min=1)
    mean = envelope.gather(1, hits.width - number).mean(1)
    return mean.masked_fill(hits.total == 0, math.nan)


@dataclass(frozen=True)
class _Hits:
    """The M positives of a block in ranked order, flat and class-major.

    Ranked labels [[1, 0, 1], [0, 1, -1]] have row = [0, 0, 1], place = [0, 2, 1], number = [1, 2, 1],
    total = [2, 1] and width = 2.
    """

    row: Tensor  # [M] class
    place: Tensor  # [M] position in the class's ranking, from 0
    number: Tensor  # [M] which positive of its class, from 1
    total: Tensor  # [C] positives of a class
    width: int  # the largest total
    seen_table: Tensor | None  # [C, n] pairs not ignored up to and with a place; None: nothing is ignored

    @staticmethod
    def of(ranked: Tensor) -> _Hits:
        """From labels [C, n] in ranked order."""
        row, place = (ranked == 1).nonzero(as_tuple=True)
        total = torch.bincount(row, minlength=ranked.shape[0])
        first = total.cumsum(0) - total
        number = torch.arange(1, row.numel() + 1, device=row.device) - first[row]
        seen = (ranked >= 0).cumsum(1) if (ranked < 0).any() else None
        return _Hits(row, place, number, total, int(total.max()), seen)

    def seen(self, place: Tensor) -> Tensor:
        """[M] how many pairs take part up to and with ``place`` [M] in the class of each positive."""
        return place + 1 if self.seen_table is None else self.seen_table[self.row, place]

    def table(self, values: Tensor, fill: float, reverse: bool = False) -> Tensor:
        """[C, width] ``values`` [M] by class and number; ``reverse``: padding, then last to first."""
        table = values.new_full((self.total.numel(), self.width), fill)
        table[self.row, self.width - self.number if reverse else self.number - 1] = values
        return table


def _tied_precision(values: Tensor, hits: _Hits) -> Tensor:
    """[M] float64 precision after the last score equal to each positive's; rows of ``values`` [C, n] fall."""
    rising = values.neg()
    wanted = hits.table(rising[hits.row, hits.place], math.inf)
    index = (hits.row, hits.number - 1)
    end = torch.searchsorted(rising, wanted, right=True)[index]
    # The padding is +inf and would tie with a score of -inf, hence the minimum.
    number = torch.searchsorted(wanted, wanted, right=True)[index].minimum(hits.total[hits.row])
    return number.double() / hits.seen(end - 1)
