"""sadcl.metrics: what it takes, the report's form, streaming, errors (the values are in test_metrics.py)."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadcl import metrics
from sadcl.metrics import MultilabelAccumulator, average_precision, multilabel_report
from tests import forks


def draw(n, c, ties=8, ignored=0.0):
    """scores [n, C] float64 on a grid of ``ties`` steps and labels [n, C] int64."""
    rng = np.random.default_rng(n + c)
    labels = (rng.random((n, c)) < 0.3).astype(np.int64)
    labels[rng.random((n, c)) < ignored] = -1
    return np.floor(rng.random((n, c)) * ties) / ties, labels


# What comes in, what goes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("score_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "label_dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64]
)
def test_dtypes(score_dtype, label_dtype):
    scores, labels = draw(63, 5, ties=8)  # eighths are exact in every dtype
    want = multilabel_report(scores, labels)
    got = multilabel_report(torch.tensor(scores, dtype=score_dtype), torch.tensor(labels).to(label_dtype))
    assert repr(got) == repr(want) and torch.equal(got.ap, want.ap) and got.ap.dtype == torch.float64


@pytest.mark.filterwarnings("error")  # torch warns of memory that it must not write
def test_numpy_layouts():
    scores, labels = draw(40, 6, ties=8)
    want = average_precision(scores, labels)
    scores.setflags(write=False)
    labels.setflags(write=False)
    assert torch.equal(average_precision(scores, labels), want)
    flipped = average_precision(scores[:, ::-1].astype(">f4"), labels[:, ::-1].astype(">i2"))
    assert torch.equal(flipped.flip(0), want)
    assert torch.equal(average_precision(torch.tensor(scores).t().contiguous().t(), labels.astype(np.uint16)), want)


def test_inputs_stay_and_no_graph():
    scores, labels = (torch.tensor(x) for x in draw(30, 4, ties=5, ignored=0.2))
    before = scores.clone(), labels.clone()
    scores.requires_grad_()
    report = multilabel_report(scores, labels)
    assert not report.ap.requires_grad
    assert torch.equal(scores, before[0]) and torch.equal(labels, before[1])


def test_one_dimension_gives_a_float():
    scores, labels = draw(30, 2)
    for method in ("voc_area", "sklearn", "voc11"):
        got = average_precision(scores[:, 1], labels[:, 1], method)
        assert isinstance(got, float)
        assert got == pytest.approx(average_precision(scores, labels, method)[1].item(), abs=1e-13)


def test_threshold_is_strict_in_the_scores_dtype():
    scores = torch.tensor([[0.1], [0.2]])
    labels = torch.ones(2, 1)
    for threshold in (0.1, np.float64(0.1), [0.1], torch.tensor([0.1]), torch.tensor(0.1)):
        assert multilabel_report(scores, labels, threshold).CR == 0.5
    assert multilabel_report(scores, labels, math.inf).CR == 0
    assert multilabel_report(scores, labels, -1).CR == 1


def test_report_carries_its_protocol():
    scores, labels = draw(30, 2)
    report = multilabel_report(scores, labels, [0.25, 0.5], ap="voc11", cf1="harmonic", absent="zero")
    for word in (
        "ap=voc11",
        "absent=zero",
        "cf1=harmonic",
        "threshold=per class",
        "30 images",
        f"mAP={report.mAP:.4f}",
    ):
        assert word in repr(report)
    assert "threshold=0.5" in repr(multilabel_report(scores, labels))
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["mAP"] == report.mAP and loaded["top3_OF1"] == report.top3_OF1
    assert loaded["ap"] == report.ap.tolist()
    assert loaded["protocol"] == {
        "threshold": [0.25, 0.5],
        "ap": "voc11",
        "cf1": "harmonic",
        "absent": "zero",
    }
    with pytest.raises(AttributeError):
        report.mAP = 1.0


def test_import_needs_torch_and_numpy_only():
    code = (
        "import sys\n"
        "for m in ('sklearn', 'torchmetrics', 'triton', 'torchvision', 'matplotlib'): sys.modules[m] = None\n"
        "import sadcl.metrics"
    )
    root = Path(metrics.__file__).parents[2]
    done = forks.run(code, cwd=root)
    assert done.returncode == 0, done.stderr


# Streaming -------------------------------------------------------------------------------------------------


def feed(accumulator, scores, labels, sizes):
    start = 0
    for size in sizes:
        accumulator.update(scores[start : start + size], labels[start : start + size])
        start += size
    return accumulator


def equal_reports(a, b):
    return a.as_dict() == b.as_dict() or repr(a.as_dict()) == repr(b.as_dict())  # NaN is not equal to itself


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 17), min_size=1, max_size=12),
    split=st.integers(0, 12),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_streaming_and_merging_equal_one_shot(sizes, split, dtype):
    scores, labels = draw(sum(sizes), 5, ties=6, ignored=0.1)
    scores = scores.astype(dtype)
    options = {"threshold": [0.1, 0.3, 0.5, 0.7, 0.9], "ap": "voc_area", "cf1": "harmonic", "absent": "zero"}
    want = multilabel_report(scores, labels, **options)
    whole = feed(MultilabelAccumulator(**options), scores, labels, sizes)
    assert equal_reports(whole.compute(), want) and len(whole) == sum(sizes)
    cut = sum(sizes[:split])
    left = feed(MultilabelAccumulator(**options), scores, labels, sizes[:split])
    right = feed(MultilabelAccumulator(**options), scores[cut:], labels[cut:], sizes[split:])
    size = len(right)
    left.merge(pickle.loads(pickle.dumps(right)))
    assert equal_reports(left.compute(), want) and len(right) == size


def test_streaming_storage():
    """Detached, copied, on the CPU, grown by doubling: n updates move O(n) rows."""
    accumulator = MultilabelAccumulator()
    scores = torch.rand(1, 3, dtype=torch.bfloat16, requires_grad=True)
    places = set()
    for _ in range(600):
        accumulator.update(scores, torch.tensor([[1, 0, -1]]))
        places.add(accumulator.scores.data_ptr())
    assert len(places) <= 11
    assert accumulator.scores.shape == (600, 3) and accumulator.scores.dtype == torch.float32
    assert accumulator.labels.dtype == torch.int8 and not accumulator.scores.requires_grad
    assert len(pickle.dumps(accumulator)) < 600 * 3 * 5 + 2000  # no spare capacity travels
    batch = np.full((2, 3), 0.5)
    accumulator.update(batch, np.zeros((2, 3)))
    batch[:] = 7
    assert accumulator.scores.dtype == torch.float64 and (accumulator.scores[-2:] == 0.5).all()
    assert torch.equal(accumulator.scores[:-2], scores.detach().double().expand(600, 3))


def test_streaming_reset_and_self_merge():
    scores, labels = draw(20, 3)
    accumulator = MultilabelAccumulator()
    accumulator.update(scores, labels)
    accumulator.merge(accumulator)
    twice = multilabel_report(np.concatenate([scores] * 2), np.concatenate([labels] * 2))
    assert equal_reports(accumulator.compute(), twice)
    accumulator.reset()
    assert len(accumulator) == 0 and accumulator.num_classes is None
    accumulator.update(*draw(20, 5))  # another C is fine after a reset
    assert accumulator.compute().ap.shape == (5,)


def test_streaming_without_images():
    with pytest.raises(ValueError, match="update"):
        MultilabelAccumulator().compute()
    empty = MultilabelAccumulator(num_classes=4)
    assert math.isnan(empty.compute().mAP) and empty.compute().ap.shape == (4,)
    fresh = MultilabelAccumulator()
    fresh.merge(MultilabelAccumulator())
    assert len(fresh) == 0 and fresh.num_classes is None


def test_streaming_errors_leave_it_as_it_was():
    scores, labels = draw(8, 3)
    accumulator = MultilabelAccumulator(threshold=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"threshold: .*C=2"):
        accumulator.update(scores[:, :2], labels[:, :2])
    assert accumulator.num_classes is None
    accumulator.update(scores, labels)
    want = accumulator.compute()
    with pytest.raises(ValueError, match=r"C=3 as before, got shape \(8, 2\)"):
        accumulator.update(scores[:, :2], labels[:, :2])
    with pytest.raises(ValueError, match="1 NaN"):
        accumulator.update(np.where(np.arange(24).reshape(8, 3) == 5, np.nan, scores), labels)
    with pytest.raises(ValueError, match="other: expected the protocol"):
        accumulator.merge(MultilabelAccumulator())
    with pytest.raises(TypeError, match=r"other: .*dict"):
        accumulator.merge({})
    assert equal_reports(accumulator.compute(), want)
    with pytest.raises(ValueError, match=r"num_classes: .*0"):
        MultilabelAccumulator(num_classes=0)
    with pytest.raises(ValueError, match="C=4"):
        MultilabelAccumulator(threshold=[0.1, 0.2], num_classes=4)


# Errors ----------------------------------------------------------------------------------------------------

S, L = torch.rand(4, 3), torch.ones(4, 3)
NAN = S.clone()
NAN[1, 2] = NAN[3, 0] = math.nan


@pytest.mark.parametrize(
    "call", [average_precision, multilabel_report, lambda s, y: MultilabelAccumulator().update(s, y)]
)
@pytest.mark.parametrize(
    ("scores", "labels", "kind", "match"),
    [
        ([[0.5]], L, TypeError, r"scores: .*list"),
        (S, None, TypeError, r"labels: .*NoneType"),
        (S.long(), L, TypeError, r"scores: .*torch.int64"),
        (S.to(torch.complex64), L, TypeError, r"scores: .*complex64"),
        (S, L.to(torch.complex64), TypeError, r"labels: .*complex64"),
        (S.numpy().astype("O"), L, TypeError, r"scores: .*object"),
        (S, np.full((4, 3), "1"), TypeError, r"labels: .*U1"),
        (S.numpy().astype(np.complex64), L, TypeError, r"scores: .*complex64"),
        (S[None], L[None], ValueError, r"scores: .*\(1, 4, 3\)"),
        (S, L[0], ValueError, r"labels: .*got \(3,\)"),
        (S, L[:, :2], ValueError, r"labels: .*\(4, 3\), got \(4, 2\)"),
        (S[:, :0], L[:, :0], ValueError, r"scores: .*\(4, 0\)"),
        (S, L.to("meta"), ValueError, "labels is on meta but scores is on cpu"),
        (NAN, L, ValueError, r"scores: .*got 2 NaN among 12"),
        (NAN, -L, ValueError, "got 2 NaN"),
        (torch.full((4, 3), math.inf) * torch.tensor([1, -1, math.nan]), L, ValueError, "got 4 NaN"),
        (S, 2 * L, ValueError, r"labels: expected 0, 1 or -1 .*got values 2$"),
        (S, torch.arange(12).view(4, 3), ValueError, r"got values 2, 3, 4, 5, 6, \.\.\.$"),
        (S, 0.5 * L, ValueError, "got values 0.5$"),
        (S, L * math.nan, ValueError, "got values nan"),
        (S, 255 * L.to(torch.uint8), ValueError, "got values 255$"),
        (S, 256 * L.int(), ValueError, "got values 256$"),
        (S, np.full((4, 3), 2**64 - 1, dtype=np.uint64), ValueError, r"got values 1.84467e\+19$"),
    ],
)
def test_bad_inputs(call, scores, labels, kind, match):
    with pytest.raises(kind, match=match):
        call(scores, labels)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"ap": "area"}, ValueError, r"ap: .*voc_area, sklearn, voc11.*'area'"),
        ({"cf1": "micro"}, ValueError, r"cf1: .*'micro'"),
        ({"absent": None}, ValueError, r"absent: .*None"),
        ({"threshold": "0.5"}, TypeError, r"threshold: .*str"),
        ({"threshold": None}, TypeError, r"threshold: .*NoneType"),
        ({"threshold": True}, TypeError, r"threshold: .*bool"),
        ({"threshold": [[0.1], [0.2, 0.3]]}, TypeError, r"threshold: .*list"),
        ({"threshold": math.nan}, ValueError, r"threshold: .*1 NaN"),
        ({"threshold": []}, ValueError, r"threshold: .*\(0,\)"),
        ({"threshold": [0.1, 0.2]}, ValueError, r"threshold: .*C=3 of them, got 2"),
        ({"threshold": torch.rand(4, 3)}, ValueError, r"threshold: .*\(4, 3\)"),
    ],
)
def test_bad_options(options, kind, match):
    with pytest.raises(kind, match=match):
        multilabel_report(S, L, **options)


def test_bad_method_and_rank():
    with pytest.raises(ValueError, match=r"method: .*'pascal'"):
        average_precision(S, L, "pascal")
    with pytest.raises(ValueError, match=r"scores: .*\[n, C\], got \(4,\)"):
        multilabel_report(S[:, 0], L[:, 0])


# Masked, sparse and lazy inputs ------------------------------------------------------------------------------


def masked_both_ways(values, mask):
    """``values`` with ``mask`` (True: masked) as numpy's masked array and as torch's masked tensor."""
    yield np.ma.array(values, mask=mask)
    if values.dtype == np.uint8:
        return  # torch's has none of that dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        yield torch.masked.masked_tensor(torch.tensor(values), torch.tensor(~mask))


@pytest.mark.parametrize("label_dtype", [np.int64, np.uint8, bool, np.float32])
@pytest.mark.parametrize("which", ["scores", "labels", "both"])
def test_a_masked_pair_is_an_ignored_pair(which, label_dtype):
    scores, labels = draw(40, 5)
    mask = np.random.default_rng(1).random((40, 5)) < 0.3
    want_labels = np.where(mask, -1, labels)
    want = multilabel_report(scores, want_labels)
    garbage = np.where(mask, np.nan, scores)  # what lies under a mask is nobody's business
    labels = np.where(mask, 1 if label_dtype is bool else 7, labels).astype(label_dtype)
    hidden_scores, hidden_labels = masked_both_ways(garbage, mask), masked_both_ways(labels, mask)
    plain = np.where(mask, 0.5, scores), np.where(mask, 1, labels).astype(label_dtype)
    if which == "scores":
        pairs = [(s, plain[1] if isinstance(s, np.ndarray) else torch.tensor(plain[1])) for s in hidden_scores]
    elif which == "labels":
        pairs = [(plain[0] if isinstance(y, np.ndarray) else torch.tensor(plain[0]), y) for y in hidden_labels]
    else:
        pairs = list(zip(hidden_scores, hidden_labels, strict=False))
    for s, y in pairs:
        got = multilabel_report(s, y)
        assert repr(got) == repr(want) and torch.equal(got.ap, want.ap)
        seen = MultilabelAccumulator()
        seen.update(s, y)
        assert torch.equal(seen.labels, torch.tensor(want_labels, dtype=torch.int8)) and seen.scores.isfinite().all()
    unmasked = np.ma.array(scores)
    assert torch.equal(average_precision(unmasked, want_labels), want.ap)
    with pytest.raises(TypeError, match="threshold"):
        multilabel_report(scores, want_labels, threshold=np.ma.array([0.5] * 5, mask=[True] * 5))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_labels_are_zero_where_nothing_is_stored(layout):
    scores, labels = (torch.tensor(x) for x in draw(40, 5, ignored=0.1))
    want = multilabel_report(scores, labels)
    got = multilabel_report(scores, labels.to_sparse(layout=layout))
    assert repr(got) == repr(want) and torch.equal(got.ap, want.ap)
    with pytest.raises(TypeError, match="scores: expected a dense tensor"):
        average_precision(scores.to_sparse(layout=layout), labels)


def test_lazy_views_are_read_as_what_they_stand_for():
    scores, labels = (torch.tensor(x) for x in draw(40, 5))
    negated = torch.complex(scores, -scores).conj().imag
    assert negated.is_neg() and torch.equal(average_precision(negated, labels), average_precision(scores, labels))
    nothing = torch._efficientzerotensor((40, 5))
    assert torch.equal(average_precision(nothing, labels), average_precision(torch.zeros(40, 5), labels))
    assert average_precision(scores, nothing).isnan().all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_an_address_are_refused_by_name():
    scores, labels = (torch.tensor(x) for x in draw(4, 2))
    nested = torch.nested.nested_tensor([torch.rand(2), torch.rand(2)])
    for wrong in ((nested, labels), (scores, nested)):
        with pytest.raises(TypeError, match="expected a plain tensor"):
            average_precision(*wrong)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(scores)
    with pytest.raises(TypeError, match="scores: expected a plain tensor, got FakeTensor"):
        average_precision(fake, labels)
