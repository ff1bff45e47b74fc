"""What a report shows of validation scores, as numbers: precision-recall curves, confusion of labels, prototypes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sadcl.head import SADCLHead

__all__ = ["Confusion", "cooccurrence_confusion", "precision_recall", "prototype_similarity", "similarity_order"]

CURVE_POINTS = 60


def precision_recall(scores: Tensor, labels: Tensor, points: int = CURVE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every distinct threshold, thinned out to ``points``, from recall 0 on.

    Args:
        scores: [n] of one class, or any shape where all pairs are pooled.
        labels: the same shape; 1, 0 or -1 (ignored).
        points: how many to keep at most, evenly along recall.

    Returns:
        Rising recall and its precision, float64; both empty without a positive.
    """
    from sklearn.metrics import precision_recall_curve

    valid = labels >= 0
    truth = (labels[valid] == 1).numpy()
    if not truth.any():
        return np.empty(0), np.empty(0)
    precision, recall, _ = precision_recall_curve(truth, scores[valid].numpy())
    recall, precision = recall[::-1], precision[::-1]
    if len(recall) > points:
        kept = np.unique(np.searchsorted(recall, np.linspace(0.0, 1.0, points)).clip(max=len(recall) - 1))
        recall, precision = recall[kept], precision[kept]
    return recall, precision


class Confusion(NamedTuple):
    """How often a label is wrongly given where another one is; see :func:`cooccurrence_confusion`.

    Attributes:
        rate: [C, C] float64, NaN where no image counts.
        wrong: [C, C] int64, the images behind it that are wrong.
        of: [C, C] int64, the images behind it.
        base: [C] float64, how often label j is wrongly given over all images without it.
    """

    rate: Tensor
    wrong: Tensor
    of: Tensor
    base: Tensor


def cooccurrence_confusion(scores: Tensor, labels: Tensor, threshold: float | Tensor = 0.5) -> Confusion:
    """``rate[i, j]``: of the images that show i and do not show j, the share in which j is predicted all the same.

    A rate far above ``base[j]`` says that the model takes i, or what i usually comes with, for j. The diagonal is
    empty. A pair with an ignored label (-1) takes no part.

    Args:
        scores: [n, C].
        labels: [n, C]; 1, 0 or -1.
        threshold: a number or [C]; predicted means score > threshold.
    """
    present, absent = (labels == 1).double(), (labels == 0).double()
    said = (scores > threshold).double() * absent
    wrong, of = present.T @ said, present.T @ absent
    base = said.sum(0) / absent.sum(0)
    return Confusion(wrong / of, wrong.long(), of.long(), base)


@torch.inference_mode()
def prototype_similarity(head: SADCLHead) -> Tensor | None:
    """[C, C] cosines between the projected prototypes of a head; None for a step-1 head."""
    if head.prototypes is None or head.projection is None:
        return None
    projected = head.projection(head.prototypes).double().cpu()
    unit = torch.nn.functional.normalize(projected, dim=1)
    return unit @ unit.T


def similarity_order(similarity: Tensor) -> list[int]:
    """The order in which alike rows lie together: leaves of average-linkage clustering of ``1 - similarity``."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    distance = (1.0 - similarity.numpy()).clip(min=0.0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True)).tolist()
