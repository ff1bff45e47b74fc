"""Average precision of every class by the CPU extension.

No gradient and nothing to compile, so this is a function and not a registered op; on other devices
:mod:`sadcl.metrics` ranks with torch. Oracle: the loops in tests/model/test_metrics.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._native import native, resolved

_METHODS = {"voc_area": 0, "sklearn": 1, "voc11": 2}


class Inputs(NamedTuple):
    """What is ranked."""

    scores: Tensor  # [n, C] float32 or float64 of any strides, no NaN
    target: Tensor  # [n, C] int8; 1, 0 or -1 (ignored)
    method: int  # a code of _METHODS


class Outputs(NamedTuple):
    """The result."""

    ap: Tensor  # [C] float64; NaN for a class without positives


def average_precision(scores: Tensor, target: Tensor, method: str) -> Tensor:
    """``[C]`` float64 of ``scores [n, C]`` and ``target [n, C]``, see :func:`sadcl.metrics.average_precision`."""
    out = Outputs(torch.empty(scores.shape[1], dtype=torch.float64, device=scores.device))
    native("average_precision")(resolved("average_precision", Inputs(scores, target, _METHODS[method])), out)
    return out.ap
