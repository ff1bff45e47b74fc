"""Op ``bank_update``: copy the recognised label features into the memory bank, in place."""

from __future__ import annotations

from typing import Any

import torch

from ._launch import Program, launch
from ._types import type_of


def bank_update(x: Any, out: Any) -> None:
    """Write ``x.slots``, see :mod:`sadcl.ops.bank`."""
    b, c, e = x.features.shape
    types = {name.upper(): type_of(getattr(x, name)) for name in ("slots", "features", "scores", "labels")}
    strides = (*x.slots.stride(), *x.features.stride(), *x.scores.stride(), *x.labels.stride())
    launch(
        Program("bank", "bank_update", types), grid=b * c, threads=128,
        args=(x.slots, x.features, x.scores, x.labels, c, e, float(x.threshold), int(x.probabilities), strides),
    )  # fmt: skip
    if not x.slots.is_inference():
        torch.autograd.graph.increment_version(x.slots)  # autograd must notice a write behind its back
