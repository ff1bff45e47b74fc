"""The report: mAP under a named protocol, and precision, recall, F1 by class and overall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadcl._checks import check_choice
from sadcl.metrics._average_precision import AP_METHODS, class_ap
from sadcl.metrics._inputs import Array, Threshold, canonical, canonical_threshold

CF1_KINDS = ("macro", "harmonic")
ABSENT_RULES = ("skip", "nan", "zero")
_TOP = 3


@dataclass(frozen=True)
class Protocol:
    """What a report's numbers mean; the arguments of :func:`multilabel_report`."""

    threshold: float | tuple[float, ...] = 0.5
    ap: str = "voc_area"
    cf1: str = "macro"
    absent: str = "skip"

    @staticmethod
    def make(threshold: Threshold, ap: str, cf1: str, absent: str) -> Protocol:
        """Check the arguments and bring the threshold into a float or a tuple of C floats."""
        check_choice("ap", ap, AP_METHODS)
        check_choice("cf1", cf1, CF1_KINDS)
        check_choice("absent", absent, ABSENT_RULES)
        return Protocol(canonical_threshold(threshold), ap, cf1, absent)

    def check_classes(self, num_classes: int) -> None:
        """Require one threshold per class, where they are per class."""
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_classes:
            got = len(self.threshold)
            raise ValueError(f"threshold: expected a number or C={num_classes} of them, got {got}")

    def __str__(self) -> str:
        per_class = isinstance(self.threshold, tuple)
        threshold = "per class" if per_class else f"{self.threshold:g}"
        return f"ap={self.ap}, absent={self.absent}, cf1={self.cf1}, threshold={threshold}"


@dataclass(frozen=True, eq=False)
class MultilabelReport:
    """The numbers of one evaluation, with the protocol they were taken under.

    ``mAP`` and ``ap`` ([C] float64 on the CPU) follow ``protocol.ap`` and ``protocol.absent``. CP, CR, CF1
    are means over all C classes, OP, OR, OF1 pool all pairs; the ``top3_`` fields count only an image's three
    highest scores. ``num_present`` is the number of classes with a positive.
    """

    mAP: float
    ap: Tensor
    CP: float
    CR: float
    CF1: float
    OP: float
    OR: float
    OF1: float
    top3_CP: float
    top3_CR: float
    top3_CF1: float
    top3_OP: float
    top3_OR: float
    top3_OF1: float
    num_images: int
    num_present: int
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON: floats, ``ap`` as a list, ``protocol`` as a dict."""
        values: dict[str, Any] = dict(vars(self))
        threshold = self.protocol.threshold
        values["ap"] = self.ap.tolist()
        values["protocol"] = dict(vars(self.protocol))
        values["protocol"]["threshold"] = list(threshold) if isinstance(threshold, tuple) else threshold
        return values

    def __repr__(self) -> str:
        names = [prefix + name for prefix in ("", "top3_") for name in _Table._fields]
        table = ", ".join(f"{name}={getattr(self, name):.4f}" for name in names)
        size = f"{self.num_images} images, {self.num_present} of {self.ap.numel()} classes with positives"
        return f"MultilabelReport(mAP={self.mAP:.4f} [{self.protocol}], {table}; {size})"


def multilabel_report(
    scores: Array,
    labels: Array,
    threshold: Threshold = 0.5,
    ap: str = "voc_area",
    cf1: str = "macro",
    absent: str = "skip",
) -> MultilabelReport:
    """mAP and the precision / recall / F1 table of a multi-label evaluation.

    A pair counts as predicted if its score > threshold, strictly. With the counts TP_c, predicted_c, true_c
    of a class: CP = mean_c TP_c / predicted_c, CR = mean_c TP_c / true_c, OP = sum TP / sum predicted,
    OR = sum TP / sum true, OF1 = 2 OP OR / (OP + OR). An empty denominator counts 0, the mean is over all C.

    Args:
        scores: [n, C] floating point; n may be 0.
        labels: [n, C]; 1, 0 or -1 (ignored).
        threshold: a number, or one per class; rounded to the scores' dtype (float32 for the half types).
        ap: the AP protocol, see :func:`average_precision`.
        cf1: ``"macro"``, the mean of the per-class F1, or ``"harmonic"``, the harmonic mean of CP and CR.
        absent: a class without positives has AP NaN and is left out of mAP (``"skip"``), or makes mAP NaN
            (``"nan"``), or has AP 0 and counts in mAP (``"zero"``). It changes ``ap`` and ``mAP`` only. With
            ``"skip"`` and no positive at all, mAP is NaN.

    Returns:
        The report. In its ``top3_`` fields a pair is predicted only if it is also among its image's three
        highest scores; ties go to the lower class index, and with C <= 3 every class is among them.

    Raises:
        TypeError, ValueError: as :func:`average_precision`; also a threshold that is NaN or not C long.
    """
    protocol = Protocol.make(threshold, ap, cf1, absent)
    scores, target = canonical(scores, labels, dims=(2,))
    return report_of(scores, target, protocol)


class _Table(NamedTuple):
    CP: float
    CR: float
    CF1: float
    OP: float
    OR: float
    OF1: float


def report_of(scores: Tensor, target: Tensor, protocol: Protocol) -> MultilabelReport:
    """The report of checked ``scores`` [n, C] and ``target`` [n, C]."""
    protocol.check_classes(scores.shape[1])
    ap = class_ap(scores, target, protocol.ap).cpu()
    present = ~ap.isnan()
    if protocol.absent == "zero":
        ap = ap.nan_to_num(nan=0.0)
    mean_ap = ap[present].mean() if protocol.absent == "skip" else ap.mean()

    threshold = torch.tensor(protocol.threshold, dtype=scores.dtype, device=scores.device)
    predicted = (scores > threshold) & (target >= 0)
    table = _table(predicted, target, protocol.cf1)
    top = _table(predicted & _top_mask(scores, target), target, protocol.cf1)
    num_present = int(present.sum())
    return MultilabelReport(float(mean_ap), ap, *table, *top, scores.shape[0], num_present, protocol)


def _table(predicted: Tensor, target: Tensor, cf1: str) -> _Table:
    """CP, CR, CF1, OP, OR, OF1 from ``predicted`` [n, C] bool (False where ignored) and ``target`` [n, C]."""
    positive = target == 1
    hit = (predicted & positive).sum(0).double()
    said, true = predicted.sum(0).double(), positive.sum(0).double()
    cp, cr = float(_ratio(hit, said).mean()), float(_ratio(hit, true).mean())
    if cf1 == "macro":
        cf = float(_ratio(2 * hit, said + true).mean())
    else:
        cf = 2 * cp * cr / (cp + cr) if cp + cr else 0.0
    hit, said, true = hit.sum(), said.sum(), true.sum()
    return _Table(cp, cr, cf, float(_ratio(hit, said)), float(_ratio(hit, true)), float(_ratio(2 * hit, said + true)))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0 (a is 0 there too)."""
    return a / b.clamp(min=1.0)


def _top_mask(scores: Tensor, target: Tensor) -> Tensor:
    """[n, C] bool: among the image's three highest scores that are not ignored.

    argmax takes the first of equals, so ties go to the lower class index. Where fewer than three scores are
    above -inf it may mark a pair twice or one at -inf, which is above no threshold: harmless.
    """
    left = scores.masked_fill(target < 0, -math.inf)
    mask = torch.zeros_like(target, dtype=torch.bool)
    for _ in range(min(_TOP, scores.shape[1])):
        best = left.argmax(dim=1, keepdim=True)
        mask.scatter_(1, best, True)
        left.scatter_(1, best, -math.inf)
    return mask
