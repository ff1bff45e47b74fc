"""Tuned thresholds against a search over every threshold that makes a difference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sadcl.metrics import multilabel_report
from sadcl.train.thresholds import tune_thresholds


def f1(scores: Tensor, labels: Tensor, threshold: float) -> float:
    said, true = (scores > threshold) & (labels >= 0), labels == 1
    both = int(said.sum() + true.sum())
    return 2 * int((said & true).sum()) / both if both else 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [4, 1000])
def test_no_threshold_is_better(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (23, 6), generator=generator) / (levels - 1)  # 4 levels: many ties, 0 and 1 too
    labels = torch.randint(-1, 2, (23, 6), generator=generator)
    tuned = tune_thresholds(scores, labels)
    for c, threshold in enumerate(tuned.tolist()):
        best = max(f1(scores[:, c], labels[:, c], t) for t in [*scores[:, c].tolist(), 0.0, 0.5])
        assert f1(scores[:, c], labels[:, c], threshold) == best


def test_what_cannot_gain_stays() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.7, 0.0], [0.6, 0.8, 0.3, 0.0], [0.1, 0.4, 0.5, 0.0]])
    labels = torch.tensor([[1, 0, -1, 1], [1, 0, -1, 0], [0, 0, -1, 1]])
    assert tune_thresholds(scores, labels).tolist() == [0.5] * 4  # perfect; no positive; no label; only zeros
    assert tune_thresholds(scores[:0], labels[:0], default=0.3).tolist() == [0.3] * 4


def test_middle_of_the_gap_and_ties() -> None:
    every = torch.tensor([[0.25], [0.75], [0.125]])
    assert tune_thresholds(every, torch.ones(3, 1)).item() == 0.0625  # all are positive: below the lowest
    high = torch.tensor([[0.9], [0.75], [0.625]])
    assert tune_thresholds(high, torch.tensor([[1], [0], [0]])).item() == pytest.approx(0.825)
    # F1 2/3 above 0.75 (one of two found, nothing wrong) and above 0.7 (both found, two wrong): nearest wins.
    scores = torch.tensor([[0.96], [0.9], [0.84], [0.76], [0.7]])
    labels = torch.tensor([[1], [0], [0], [1], [0]])
    assert {f1(scores[:, 0], labels[:, 0], t) for t in (0.93, 0.73)} == {2 / 3}
    assert tune_thresholds(scores, labels).item() == pytest.approx(0.73)
    assert tune_thresholds(scores, labels, default=0.99).item() == pytest.approx(0.93)


def test_neighbouring_floats_are_told_apart() -> None:
    above = torch.tensor(0.7)
    below = torch.nextafter(above, torch.tensor(0.0))
    for upper, lower in itertools.pairwise([above, below, torch.nextafter(below, torch.tensor(0.0))]):
        scores = torch.stack([upper, lower])[:, None]
        tuned = tune_thresholds(scores, torch.tensor([[1], [0]]))
        assert (scores > tuned.float()).flatten().tolist() == [True, False]


def test_report_gains_under_tuned_thresholds() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(200, 5, generator=generator) < 0.2).long()
    scores = (0.25 * labels + 0.3 * torch.rand(200, 5, generator=generator)).clamp(0, 1)
    plain, tuned = (multilabel_report(scores, labels, t) for t in (0.5, tune_thresholds(scores, labels)))
    assert tuned.CF1 > plain.CF1 and tuned.mAP == plain.mAP


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"scores: expected 0\.\.1, got"):
        tune_thresholds(torch.tensor([[2.0]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="default: expected"):
        tune_thresholds(torch.rand(2, 2), torch.ones(2, 2), default=1.5)
