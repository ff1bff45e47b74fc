"""sadcl.metrics against golden numbers, scikit-learn and straight loops written from the definitions."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_aps, loop_table
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from sadcl.metrics import average_precision, multilabel_report

GOLDEN = Path(__file__).parents[1] / "golden"
METHODS = ("voc_area", "sklearn", "voc11")
TABLE = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def draw(n, c, seed=0, ties=0, ignored=0.0, rate=0.3):
    """scores [n, C] float64 (on a grid of ``ties`` steps if given) and labels [n, C] int64."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n, c))
    if ties:
        scores = np.floor(scores * ties) / ties
    labels = (rng.random((n, c)) < rate).astype(np.int64)
    labels[rng.random((n, c)) < ignored] = -1
    return scores, labels


def table(report, prefix=""):
    return np.array([getattr(report, prefix + name) for name in TABLE])


def same(got, want, tolerance=1e-13):
    got = got.numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


# Golden numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["000", "001", "002"])
def test_golden(name, dtype):
    data = np.load(GOLDEN / f"metrics_{name}.npz")
    scores, labels = data["scores"].astype(dtype), data["labels"]
    report = multilabel_report(scores, labels, float(data["threshold"]), absent="nan")
    if data["ties"]:
        # any order within a tie is right: between positives last and positives first
        last, first = np.argsort(labels, axis=0), np.argsort(1 - labels.astype(int), axis=0)
        low, high = (
            average_precision(np.take_along_axis(scores, o, 0), np.take_along_axis(labels, o, 0)).numpy() * 100
            for o in (last, first)
        )
        assert ((low <= data["aps"]) & (data["aps"] <= high)).all()
        assert ((low <= report.ap.numpy() * 100) & (report.ap.numpy() * 100 <= high)).all()
    else:
        same(report.ap * 100, data["aps"], 1e-10)
        same(report.mAP * 100, data["mAP"], 1e-10)
    if "all_CP_CR_CF_OP_OR_OF" in data:
        assert (np.round(table(report) * 100, 2) == data["all_CP_CR_CF_OP_OR_OF"]).all()
        assert (np.round(table(report, "top3_") * 100, 2) == data["top3_CP_CR_CF_OP_OR_OF"]).all()
    else:
        assert name == "002" and np.isnan(data["aps"]).sum() == 1


# scikit-learn and the loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [0, 5])
def test_average_precision_is_scikit_learns(ties):
    scores, labels = draw(257, 13, ties=ties)
    want = average_precision_score(labels, scores, average=None)
    same(average_precision(scores, labels, "sklearn"), want)


def test_table_is_scikit_learns():
    scores, labels = draw(257, 13, rate=0.2)
    scores[:, 3] = 0.1  # never predicted
    labels[:, 4] = 0  # never true
    report = multilabel_report(scores, labels)
    predicted = scores > 0.5
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
    micro = precision_recall_fscore_support(labels, predicted, average="micro", zero_division=0)[:3]
    same(table(report), [*macro, *micro])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "c", "ties", "ignored", "rate"),
    [
        (63, 5, 0, 0.0, 0.3),
        (63, 5, 4, 0.0, 0.3),
        (63, 7, 4, 0.3, 0.3),
        (100, 3, 0, 0.5, 0.02),
        (10, 4, 3, 0.9, 0.9),
    ],
)
def test_average_precision_is_the_loops(method, n, c, ties, ignored, rate):
    scores, labels = draw(n, c, ties=ties, ignored=ignored, rate=rate)
    same(average_precision(scores, labels, method), loop_aps(scores, labels, method))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 24),
    c=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    ties=st.sampled_from([0, 1, 3]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    cf1=st.sampled_from(["macro", "harmonic"]),
    per_class=st.booleans(),
)
def test_everything_is_the_loops(n, c, seed, ties, ignored, rate, cf1, per_class):
    scores, labels = draw(n, c, seed, ties, ignored, rate)
    scores[scores > 0.9], scores[scores < 0.1] = np.inf, -np.inf
    for method in METHODS:
        same(average_precision(scores, labels, method), loop_aps(scores, labels, method))
    threshold = np.linspace(0.2, 0.8, c) if per_class else 1 / 3  # 1/3: a grid value, and > is strict
    report = multilabel_report(scores, labels, threshold, cf1=cf1)
    if n:
        same(table(report), loop_table(scores, labels, threshold, cf1))
        same(table(report, "top3_"), loop_table(scores, labels, threshold, cf1, top=3))
    else:
        assert not table(report).any() and not table(report, "top3_").any() and math.isnan(report.mAP)


# Properties ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), seed=st.integers(0, 10**6), ties=st.sampled_from([0, 3]))
def test_order_of_images(n, seed, ties):
    """Only the protocols that rank ties in input order may see it, and those only with ties."""
    scores, labels = draw(n, 4, seed, ties, ignored=0.1)
    order = np.random.default_rng(seed + 1).permutation(n)
    for method in METHODS if not ties else ("sklearn",):
        same(average_precision(scores[order], labels[order], method), average_precision(scores, labels, method))
    got, want = multilabel_report(scores[order], labels[order]), multilabel_report(scores, labels)
    assert (table(got) == table(want)).all() and (table(got, "top3_") == table(want, "top3_")).all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), seed=st.integers(0, 10**6), ties=st.sampled_from([2, 16]))
def test_monotone_transform(n, seed, ties):
    scores, labels = draw(n, 4, seed, ties, ignored=0.1)
    for method in METHODS:
        want = average_precision(scores, labels, method)
        assert torch.equal(average_precision(7 * scores**3 - 3, labels, method).nan_to_num(), want.nan_to_num())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), method=st.sampled_from(METHODS))
def test_perfect_ranking_is_one(n, seed, method):
    scores, labels = draw(n, 4, seed)
    labels[0] = 1
    assert (average_precision(scores + labels, labels, method) == 1).all()


def test_tie_rules():
    labels = np.array([[0], [1], [0], [1]])
    scores = np.full((4, 1), 0.7)
    assert average_precision(scores, labels).item() == 0.5
    assert average_precision(scores, labels[::-1].copy()).item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores, labels, "sklearn").item() == 0.5
    assert average_precision(np.array([[0.0], [-0.0]]), np.array([[1], [0]]), "sklearn").item() == 0.5


def test_voc11_reads_recall_exactly():
    """Recall 3/10 counts as >= 0.3, though 0.1 * 3 > 0.3 in floating point."""
    labels = np.array([1] * 3 + [0] * 5 + [1] * 7)
    scores = np.linspace(1, 0, 15)
    later = Fraction(10, 15)
    assert average_precision(scores, labels, "voc11") == pytest.approx(float((4 + 7 * later) / 11), abs=1e-15)


def test_top3_ties_go_to_the_lower_class():
    labels = np.array([[1, 1, 0, 1, 1]])
    report = multilabel_report(np.array([[0.6, 0.9, 0.6, 0.6, 0.6]]), labels)
    assert report.top3_OP == pytest.approx(2 / 3) and report.top3_OR == 2 / 4
    labels[0, 0] = -1  # an ignored pair frees its place
    report = multilabel_report(np.array([[0.6, 0.9, 0.6, 0.6, 0.6]]), labels)
    assert report.top3_OP == pytest.approx(2 / 3) and report.top3_OR == pytest.approx(2 / 3)


def test_top3_below_the_threshold_still_takes_a_place():
    scores, labels = np.array([[0.9, 0.8, 0.7, 0.6]]), np.ones((1, 4))
    report = multilabel_report(scores, labels, threshold=[0.95, 0.5, 0.5, 0.5])
    assert report.OR == 0.75 and report.top3_OR == 0.5


@pytest.mark.parametrize("c", [1, 2, 3])
def test_top3_of_few_classes_is_everything(c):
    report = multilabel_report(*draw(40, c))
    assert (table(report, "top3_") == table(report)).all()


def test_ignored_pairs_take_no_part():
    """Removing an image from a class's column, or ignoring it there, is the same."""
    scores, labels = draw(90, 3, ties=6)
    labels[::4, 1] = -1
    report = multilabel_report(scores, labels)
    keep = labels[:, 1] >= 0
    for method in METHODS:
        got = average_precision(scores, labels, method)[1]
        same(got, average_precision(scores[keep, 1], labels[keep, 1], method))
    alone = [
        multilabel_report(scores[labels[:, c] >= 0, c : c + 1], labels[labels[:, c] >= 0, c : c + 1]) for c in range(3)
    ]
    same(report.CP, np.mean([r.CP for r in alone]))
    same(report.CR, np.mean([r.CR for r in alone]))
    flipped = np.where(labels < 0, 1 - scores, scores)
    assert repr(multilabel_report(flipped, labels)) == repr(report)


# Absent classes, edges -------------------------------------------------------------------------------------


def test_absent_rules():
    scores, labels = draw(50, 4)
    labels[:, 2] = 0
    skip, nan, zero = (multilabel_report(scores, labels, absent=a) for a in ("skip", "nan", "zero"))
    assert skip.ap[2].isnan() and nan.ap[2].isnan() and zero.ap[2] == 0
    assert math.isnan(nan.mAP)
    assert skip.mAP == pytest.approx(skip.ap[[0, 1, 3]].mean().item(), abs=1e-15)
    assert zero.mAP == pytest.approx(0.75 * skip.mAP, abs=1e-15)
    assert skip.num_present == nan.num_present == zero.num_present == 3
    for other in (nan, zero):
        assert (table(other) == table(skip)).all() and (table(other, "top3_") == table(skip, "top3_")).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0, 1, -1])
def test_one_label_everywhere(method, value):
    scores, _ = draw(20, 3, ties=4)
    got = average_precision(scores, np.full((20, 3), value), method)
    assert (got == 1).all() if value == 1 else got.isnan().all()


@pytest.mark.parametrize("absent", ["skip", "nan", "zero"])
def test_no_images(absent):
    report = multilabel_report(np.zeros((0, 4)), np.zeros((0, 4)), absent=absent)
    assert report.mAP == 0 if absent == "zero" else math.isnan(report.mAP)
    assert report.num_images == 0 and not table(report).any()
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize("method", METHODS)
def test_classes_in_blocks(method, monkeypatch):
    scores, labels = draw(50, 7, ties=9, ignored=0.1)
    want = average_precision(scores, labels, method)
    monkeypatch.setattr(sys.modules[average_precision.__module__], "_BLOCK", 100)  # two classes at a time
    same(average_precision(scores, labels, method), want)
