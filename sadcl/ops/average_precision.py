"""Average precision of every class by the CPU extension.

No gradient and nothing to compile, so this is a function and not a registered op; on other devices
:mod:`sadcl.metrics` ranks with torch. Oracle: the loops in tests/test_metrics.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import array, extension

_METHODS = {"voc_area": 0, "sklearn": 1, "voc11": 2}


def average_precision(scores: Tensor, target: Tensor, method: str) -> Tensor:
    """``[C]`` float64; NaN for a class without positives.

    Args:
        scores: ``[n, C]`` float32 or float64 of any strides, no NaN.
        target: ``[n, C]`` int8; 1, 0 or -1 (ignored).
        method: ``"voc_area"``, ``"sklearn"`` or ``"voc11"``, see :func:`sadcl.metrics.average_precision`.
    """
    ap = torch.empty(scores.shape[1], dtype=torch.float64)
    extension().average_precision(array(scores), array(target), _METHODS[method], array(ap), torch.get_num_threads())
    return ap
