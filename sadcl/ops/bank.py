"""Op ``bank_update``: write the recognised label features into the memory bank, in place.

Oracle: :func:`sadcl.reference.bank.bank_update`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import array, extension, implemented, register, triton_kernel


def _cpp(
    slots: Tensor, features: Tensor, scores: Tensor, labels: Tensor, threshold: float, probabilities: bool
) -> None:
    if (slots.dtype == torch.float64) != (features.dtype == torch.float64):
        features = features.to(slots.dtype)
    if slots.stride(2) != 1 and slots.shape[2] > 1:
        _torch(slots, features, scores, labels, threshold, probabilities)
        return
    scores = _wide(scores)
    extension().bank_update(
        array(slots), array(features), array(scores), array(labels), threshold, probabilities, torch.get_num_threads()
    )
    if not slots.is_inference():
        torch.autograd.graph.increment_version(slots)  # autograd must notice a write behind its back


def _torch(
    slots: Tensor, features: Tensor, scores: Tensor, labels: Tensor, threshold: float, probabilities: bool
) -> None:
    scores = _wide(scores)
    recognised = (scores if probabilities else scores.sigmoid()) > threshold
    write = (recognised & (labels == 1))[:, :, None]
    current = slots[: features.shape[0]]
    current.copy_(torch.where(write, features.to(current.dtype), current))


def _wide(scores: Tensor) -> Tensor:
    """Half precision would round the threshold."""
    return scores if scores.dtype == torch.float64 else scores.float()


_IMPLEMENTATIONS = {"cpp": _cpp, "triton": triton_kernel("bank", "bank_update"), "torch": _torch}
IMPLEMENTED = implemented(_IMPLEMENTATIONS)

register(
    "bank_update",
    "(Tensor(a!) slots, Tensor features, Tensor scores, Tensor labels, float threshold, bool probabilities,"
    " str backend) -> ()",
    _IMPLEMENTATIONS,
    lambda *_: None,
)


def bank_update(
    slots: Tensor, features: Tensor, scores: Tensor, labels: Tensor, threshold: float, probabilities: bool, backend: str
) -> None:
    """Set ``slots[b, c] = features[b, c]`` where ``labels[b, c]`` is 1 and the score exceeds the threshold.

    Args:
        slots: ``[B_slot, C, E]``, written; the first B of them.
        features: ``[B, C, E]``, of any floating dtype; no gradient passes.
        scores: ``[B, C]`` logits, or probabilities; compared in float32 (float64 for float64).
        labels: ``[B, C]`` of any real dtype.
        threshold: probability that must be exceeded.
        probabilities: what the scores are.
        backend: a name out of :data:`IMPLEMENTED`.
    """
    with torch.no_grad():
        torch.ops.sadcl.bank_update(slots, features, scores, labels, float(threshold), probabilities, backend)
