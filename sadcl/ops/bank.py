"""Op ``bank_update``: write the recognised label features into the memory bank, in place.

Oracle: :func:`sadcl.reference.bank.bank_update`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..portable import bank as portable
from ._library import Into, Op
from ._native import cuda_kernel, native, triton_kernel


class Inputs(NamedTuple):
    """What is written where ``labels[b, c]`` is 1 and the score exceeds the threshold."""

    slots: Tensor  # [B_slot, C, E], written; the first B of them
    features: Tensor  # [B, C, E], of any floating dtype; no gradient passes
    scores: Tensor  # [B, C] logits, or probabilities; compared in float32 (float64 for float64)
    labels: Tensor  # [B, C] of any real dtype
    threshold: float  # probability that must be exceeded
    probabilities: bool  # what the scores are


class Outputs(NamedTuple):
    """Nothing."""


def _cpp(x: Inputs, out: Outputs) -> None:
    slots, features = x.slots, x.features
    if slots.stride(2) != 1 and slots.shape[2] > 1:
        portable.update(x, out)
        return
    if (slots.dtype == torch.float64) != (features.dtype == torch.float64):
        features = features.to(slots.dtype)
    native("bank_update")(x._replace(features=features, scores=portable.wide(x.scores)))
    if not slots.is_inference():
        torch.autograd.graph.increment_version(slots)  # autograd must notice a write behind its back


bank_update = Op(
    "bank_update",
    Inputs,
    Outputs,
    lambda x: Outputs(),
    {
        "cpp": Into(_cpp),
        "triton": Into(triton_kernel("bank", "bank_update")),
        "cuda": Into(cuda_kernel("bank", "bank_update")),
        "torch": Into(portable.update),
    },
    mutates="slots",
)
