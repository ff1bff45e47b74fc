"""Prototypes from a step-1 model."""

from __future__ import annotations

import warnings

import pytest
import torch

from sadcl.head import SADCLHead
from sadcl.prototypes import build_prototypes


def batches(seed=0, count=4, classes=5, width=3):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, classes, width, generator=g),
            torch.randn(6, classes, generator=g) * 3,
            torch.randint(-1, 2, (6, classes), generator=g),
        )
        for _ in range(count)
    ]


def test_means_of_confident_positives_or_of_all():
    data = batches()
    for _, logits, labels in data:
        labels[:, 3] = labels[:, 3].clamp(max=0)  # never positive
        logits[:, 1] = logits[:, 1].clamp(max=1.0)  # never confident
    with pytest.warns(UserWarning, match="no positive of class 3;"):
        got = build_prototypes(iter(data))
    features, logits, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    for c in range(5):
        positive = labels[:, c] == 1
        confident = positive & (logits[:, c].sigmoid() > 0.85)
        rows = features[confident if c != 1 else positive, c].double()
        if c == 3:
            usual = got[[0, 1, 2, 4]].norm(dim=1).mean()
            torch.testing.assert_close(got[3].norm(), usual)
        else:
            torch.testing.assert_close(got[c], rows.mean(0).float(), rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(build_prototypes(data), got)  # the random vector too
        other = build_prototypes(data, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(other[3], got[3]) and torch.equal(other[:3], got[:3])


def test_sums_are_streamed_in_float64():
    features = torch.full((1000, 1, 1), 1e8)
    features[::2] = -1e8
    features[0] += 8.0
    data = [(f[None], torch.full((1, 1), 9.0), torch.ones(1, 1)) for f in features]
    assert build_prototypes(data).item() == pytest.approx(8e-3, rel=1e-6)


def test_nothing_positive_at_all_and_infinite_negatives():
    with pytest.warns(UserWarning, match="0, 1"):
        got = build_prototypes([(torch.full((2, 2, 4), float("inf")), torch.zeros(2, 2), torch.zeros(2, 2))])
    torch.testing.assert_close(got.norm(dim=1), torch.full((2,), 2.0))


def test_runs_a_model_in_eval_mode_and_puts_it_back():
    torch.manual_seed(0)
    head = SADCLHead(8, 3, 8, 2, 16, 1, 1, 4, (2, 2), dropout=0.5, contrastive=False).train()
    x = torch.randn(10, 8, 2, 2)
    labels = torch.ones(10, 3)
    got = build_prototypes(head, [(x[:4], labels[:4], "extra"), (x[4:], labels[4:], "extra")], threshold=0.0)
    assert head.training
    want = head.eval()(x).label_features.mean(0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    head.train().init_contrastive(got, batch_slots=4)
    assert torch.equal(head.prototypes, got) and torch.equal(head.memory_bank.slots[3], got)


def test_bad_input():
    with pytest.raises(ValueError, match="no batch"):
        build_prototypes([])
    with pytest.raises(TypeError, match="loader"):
        build_prototypes(SADCLHead(8, 3, 8, 2, 16, 1, 1, 4, (2, 2)))
    with pytest.raises(ValueError, match="labels"):
        build_prototypes([(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 4))])
    with pytest.raises(ValueError, match="threshold"):
        build_prototypes([], threshold=85)
