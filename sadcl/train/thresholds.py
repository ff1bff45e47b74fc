"""One threshold per class, chosen on validation scores for the best F1."""

from __future__ import annotations

import torch
from torch import Tensor

from sadcl.metrics._inputs import Array, canonical

__all__ = ["tune_thresholds"]


def tune_thresholds(scores: Array, labels: Array, default: float = 0.5) -> Tensor:
    """The threshold of each class that maximises its F1 = 2 TP / (predicted + true); predicted: score > threshold.

    Only what lies between two different scores matters, so the candidates are the gaps between neighbouring scores of
    a class, and one below the lowest (which a score of 0 leaves empty). Which threshold a class gets:

    - the default, wherever no other reaches a higher F1: nothing moves without a gain;
    - otherwise the middle of the best gap; of several equally good ones, of the gap nearest to the default, of two
      equally near ones of the lower;
    - the default for a class without a positive (its F1 is 0 whatever one chooses) or without a label at all.

    F1 on the scores that the thresholds were chosen on is optimistic, the more so the fewer positives a class has.

    Args:
        scores: probabilities [n, C] in 0..1.
        labels: [n, C]; 1, 0 or -1 (ignored: the pair takes no part).
        default: in 0..1.

    Returns:
        [C] float64 on the CPU.

    Raises:
        TypeError, ValueError: as :func:`sadcl.metrics.multilabel_report`; a score or the default outside 0..1.
    """
    values, target = canonical(scores, labels, dims=(2,))
    if not 0.0 <= default <= 1.0:
        raise ValueError(f"default: expected 0 <= default <= 1, got {default}")
    if values.numel() and not (float(values.min()) >= 0.0 and float(values.max()) <= 1.0):
        raise ValueError(f"scores: expected 0..1, got {float(values.min()):g}..{float(values.max()):g}")
    columns = zip(values.cpu().T, target.cpu().T, strict=True)
    tuned = [_tune_class(s[t >= 0], t[t >= 0] == 1, default) for s, t in columns]
    return torch.tensor(tuned, dtype=torch.float64, device="cpu")


def _tune_class(scores: Tensor, positive: Tensor, default: float) -> float:
    """The threshold of one class from its ``scores`` [n] and ``positive`` [n] bool."""
    total = int(positive.sum())
    if total == 0:
        return default
    ranked, order = scores.sort(descending=True)
    hits = positive[order].cumsum(0)
    below = torch.cat([ranked[1:], ranked.new_zeros(1)])
    ends = ranked > below  # predicting the first k + 1 is possible: a gap follows
    count = torch.arange(1, len(ranked) + 1, device=scores.device)
    f1 = torch.where(ends, 2.0 * hits.double() / (count + total), 0.0)
    said = scores > scores.new_tensor(default)
    best = float(f1.max())
    if best <= float(2.0 * (said & positive).sum().double() / (int(said.sum()) + total)):
        return default
    middle = (ranked.double() + below.double()) / 2
    # A gap can be one step of the dtype wide: its middle must not round up to the score above it.
    middle = torch.where(middle.to(ranked.dtype) < ranked, middle, below.double())
    candidates = middle[f1 == best]  # falling
    distance = (candidates - default).abs()
    return float(candidates[distance == distance.min()][-1])
