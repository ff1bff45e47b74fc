"""Thresholds of shares as comparisons of whole numbers."""

from __future__ import annotations

import functools
import math
from fractions import Fraction


@functools.lru_cache(maxsize=64)
def least_share(threshold: float, classes: int) -> tuple[int, int]:
    """The smallest ``I / U`` with ``U <= classes`` that is at least ``threshold`` in float64, in lowest terms.

    ``I / U >= threshold`` is then a comparison of whole numbers, whose products int32 holds up to 46,340 classes.
    """
    found = Fraction(1)
    for union in range(1, classes + 1):
        shared = max(0, math.ceil(threshold * union) - 1)
        while shared / union < threshold:
            shared += 1
        found = min(found, Fraction(shared, union))
    return found.numerator, found.denominator
