"""The CPU extension's SSCL, called through its bindings and held against float64 numpy."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sscl_bindings import _C, Run, Truth, check, close, make, oracle

from sadcl import reference
from sadcl.testing import Budget, assert_within_budget, error_budgets, value_and_grads

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("sscl_*.npz"))


@pytest.mark.skipif(not GOLDEN, reason="no golden files")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_paper(path: Path, every_isa: str) -> None:
    data = np.load(path)
    run = Run(torch.from_numpy(data["features"]), torch.from_numpy(data["labels"]), float(data["temperature"]))
    loss = run.row_loss.double().sum().item() / max(run.active, 1)
    assert abs(loss - data["paper_loss"]) <= 1e-5 * max(abs(data["paper_loss"]), 0.3)
    want = data["paper_grad"].astype(np.float64)
    assert np.linalg.norm(run.grad.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3)


@pytest.mark.skipif(not GOLDEN, reason="no golden files")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_released(path: Path, every_isa: str) -> None:
    data = np.load(path)
    x, labels = torch.from_numpy(data["features"]), torch.from_numpy(data["labels"])
    B, V, C, _ = x.shape
    kept = torch.stack([torch.stack([labels[(v * B + b) // V] for v in range(V)]) for b in range(B)]).float()
    factor = float(data["temperature"]) / float(data["base_temperature"]) / max(V * int(labels.sum()), 1)
    run = Run(x, labels, float(data["temperature"]), released=True, anchor_weights=kept * factor)
    loss = (run.row_loss.double() * kept.double()).sum().item() * factor
    assert abs(loss - data["released_loss"]) <= 1e-5 * max(abs(data["released_loss"]), 0.3)
    want = data["released_grad"].astype(np.float64)
    assert np.linalg.norm(run.grad.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3)


@functools.cache
def case(shape: tuple[int, ...], released: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Truth]:
    """``make(*shape)`` and the oracle's answer."""
    x, labels, weights = make(*shape)
    return x, labels, weights, oracle(x, labels, 0.2, weights, released=released)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 1), (4, 2, 5, 7), (5, 3, 6, 63), (6, 1, 9, 100), (4, 2, 3, 257), (30, 2, 9, 33)]
)
def test_matches_oracle(shape, released: bool, threads: int, every_isa: str) -> None:
    x, labels, weights, truth = case(shape, released)
    run = Run(x, labels, threads=threads, released=released, anchor_weights=weights)
    check(run, truth, 2e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.024, 0.005])
def test_temperature(temperature: float, every_isa: str) -> None:
    x, labels, weights = make(12, 2, 5, 40)  # 0.024 and 0.005: beyond the fixed shift
    check(Run(x, labels, temperature, anchor_weights=weights), oracle(x, labels, temperature, weights), 1e-4)


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_without_normalisation(size: float, every_isa: str) -> None:
    x, labels, weights = make(10, 2, 5, 17)
    x = x * (size / 4)
    largest_score = (x.double() ** 2).sum(
        -1
    ).max().item() / 0.2  # 40 or 4,000: a float32 score is off by an ulp of that
    run = Run(x, labels, 0.2, normalize=False, anchor_weights=weights)
    check(run, oracle(x, labels, 0.2, weights, normalize=False), 1e-5 + largest_score * 2.0**-23)


@pytest.mark.parametrize("shape", [(5, 2, 6, 13), (40, 2, 5, 9)])
def test_float64(shape, every_isa: str) -> None:
    x, labels, weights = make(*shape, dtype=torch.float64)
    for released in (False, True):
        run = Run(x, labels, 0.07, released=released, anchor_weights=weights)
        check(run, oracle(x, labels, 0.07, weights, released=released), 1e-12)


@pytest.mark.parametrize("dtype,relative", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_types(dtype: torch.dtype, relative: float, every_isa: str) -> None:
    """Read exactly, computed in float32, rounded once on the way out."""
    x, labels, weights = make(9, 2, 6, 65, dtype=dtype)
    run, truth = Run(x, labels, anchor_weights=weights), oracle(x.double(), labels, 0.2, weights)
    close(run.row_loss, truth.row_loss, 1e-5)
    close(run.grad, truth.grad, 1.01 * relative + 2e-5)


RAGGED = {
    "no active row": lambda y: y.zero_(),
    "one active pair": lambda y: y.zero_().index_put_(
        (torch.tensor(3), torch.tensor(2)), torch.tensor(1, dtype=y.dtype)
    ),
    "every class a single row": lambda y: y.zero_().fill_diagonal_(1),
    "one huge class": lambda y: y.zero_().index_fill_(1, torch.tensor([4]), 1),
    "all active": lambda y: y.fill_(1),
    "an image without labels": lambda y: y.index_fill_(0, torch.tensor([0, 5]), 0),
}


@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize("views", [1, 2])
def test_ragged(case: str, views: int, every_isa: str) -> None:
    x, labels, weights = make(8, views, 7, 31)
    RAGGED[case](labels)
    for released in (False, True):
        run = Run(x, labels, released=released, anchor_weights=weights)
        check(run, oracle(x, labels, 0.2, weights, released=released), 2e-5)


@functools.cache
def case_of_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Truth]:
    """So many active rows, and the oracle's answer."""
    x, labels, weights = make(rows // 4, 1, 8, 24, density=0.0)
    labels.view(-1)[torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(1))[:rows]] = 1
    return x, labels, weights, oracle(x, labels, 0.2, weights)


@pytest.mark.parametrize("keep", [None, 0])
@pytest.mark.parametrize("rows", [500, 512, 520, 1300])
def test_around_the_limit_of_few_scores(rows: int, keep: int | None, every_isa: str) -> None:
    x, labels, weights, truth = case_of_rows(rows)
    run = Run(x, labels, keep=keep, anchor_weights=weights)
    assert run.active == rows
    check(run, truth, 3e-5)
    assert torch.isfinite(run.kept).all() and run.kept[: rows * rows].any() == (keep is None)
    assert not run.kept[rows * rows :].any()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_scores_change_nothing(dtype: torch.dtype, released: bool, every_isa: str) -> None:
    """None, not even a header, some and all of the scores kept: the same bits. And a backward with other threads."""
    x, labels, weights = make(150, 2, 8, 24, density=0.5)
    x, weights = x.to(dtype), weights.to(dtype)
    same = {"released": released, "anchor_weights": weights}
    for threads in (1, 3):
        want = Run(x, labels, keep=0, threads=threads, **same)
        assert want.active > 1000
        for keep in (7, 100, _C.SSCL_FEW_SCORES, 1 << 20):
            got = Run(x, labels, keep=keep, threads=threads, **same)
            assert torch.isfinite(got.kept).all() and got.kept.any() == (keep > 7)
            for a, b in zip(got.tensors(), want.tensors(), strict=True):
                assert a is got.kept or torch.equal(a, b)
        other = Run(x, labels, keep=1 << 20, threads=threads, backward_threads=2, **same)
        torch.testing.assert_close(other.grad, want.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_is_room_for_the_scores_that_are_worth_keeping(dtype: torch.dtype, every_isa: str) -> None:
    """sscl_keep follows the blocks: where it says all, a larger buffer holds not one score more."""
    for rows in (513, 4 * 192, 1100):
        keep = _C.sscl_keep(rows, 1000)
        assert rows * rows // 2 < keep < rows * rows
        x, labels, weights = make(rows, 1, 1, 4, density=2.0)
        for threads in (1, 2, 3):
            given = Run(x.to(dtype), labels, anchor_weights=weights.to(dtype), keep=keep, threads=threads).kept
            more = Run(x.to(dtype), labels, anchor_weights=weights.to(dtype), keep=2 * keep, threads=threads).kept
            assert torch.equal(given, more[:keep]) and not more[keep:].any()


def test_what_is_worth_keeping() -> None:
    few = math.isqrt(_C.SSCL_FEW_SCORES)
    assert [_C.sscl_keep(n, 1) for n in (0, 3, few, few + 1)] == [0, 9, _C.SSCL_FEW_SCORES, 0]
    wide, half, narrow = (_C.sscl_keep(2000, width) for width in (400, 200, 100))
    assert wide > 2000 * 2000 / 2 and half == 3.5 * 2000 * 200 and narrow == 0


def test_released_maxima_in_stripes(every_isa: str) -> None:
    """Over the kept-scores limit with several stripes of images: against the same rows in float64."""
    x, labels, weights = make(150, 2, 6, 8, density=0.5)
    labels[:3] = 1
    single = Run(x, labels, released=True, anchor_weights=weights, keep=0)
    assert single.active > 512
    double = Run(x.double(), labels, released=True, anchor_weights=weights.double(), keep=0)
    close(single.row_loss, double.row_loss.numpy(), 2e-5)


def test_strided_and_expanded(every_isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    plain = Run(x, labels, anchor_weights=weights)
    storage = torch.full((5, 19, 3, 6, 2), float("nan"))
    storage[:, :, 1] = x.permute(2, 3, 0, 1)
    view = storage[:, :, 1].permute(2, 3, 0, 1)
    assert view.stride(3) != 1
    strided = Run(view, labels, anchor_weights=weights)
    assert torch.equal(strided.row_loss, plain.row_loss) and torch.equal(strided.grad, plain.grad)
    expanded, copied = x[:, :1].expand(6, 2, 5, 19), x[:, :1].repeat(1, 2, 1, 1)
    one_weight = torch.tensor(0.01).expand(6, 2, 5)
    a, b = Run(expanded, labels, anchor_weights=one_weight), Run(copied, labels, anchor_weights=one_weight.contiguous())
    assert torch.equal(a.row_loss, b.row_loss) and torch.equal(a.grad, b.grad)


def test_inactive_rows_are_never_read(every_isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    plain = Run(x, labels, anchor_weights=weights)
    x[(labels == 0)[:, None, :].expand(6, 2, 5)] = float("nan")
    assert torch.equal(Run(x, labels, anchor_weights=weights).grad, plain.grad)


def test_groups_other_than_classes(every_isa: str) -> None:
    """SupConLoss's use: C = 1, the groups are the images of one label."""
    x, _, weights = make(20, 2, 1, 11)
    group_of = [i * 7 % 4 for i in range(20)]
    order = sorted(range(20), key=lambda b: (group_of[b], b))
    sizes = [group_of.count(g) for g in range(4)] + [0] * 16
    pairs = torch.tensor(order, dtype=torch.int32)
    class_ptr = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    labels = torch.ones(20, 1, dtype=torch.uint8)
    run = Run(x, labels, normalize=False, temperature=3.0, anchor_weights=weights, groups=(pairs, class_ptr))
    check(run, oracle(x, labels, 3.0, weights, normalize=False, group_of=group_of), 2e-5)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-41])
def test_extreme_features(scale: float, every_isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    x = (x.double() * scale).float()
    run, truth = Run(x, labels, anchor_weights=weights), oracle(x, labels, 0.2, weights)
    close(run.row_loss, truth.row_loss, 1e-5)
    if np.abs(truth.grad).max() < 3e38 and np.abs(truth.grad).max() > 1e-37:
        close(run.grad / np.abs(truth.grad).max(), truth.grad / np.abs(truth.grad).max(), 2e-5)


def test_zero_rows(every_isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    labels[0] = 1
    x[0] = 0
    run = Run(x, labels, anchor_weights=weights)
    check(run, oracle(x, labels, 0.2, weights), 2e-5)
    assert not run.grad[0].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_non_finite_rows_give_nan(poison: float, temperature: float, every_isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    labels[1, 2] = 1
    x[1, 0, 2, 3] = poison
    for released in (False, True):
        run = Run(x, labels, temperature, released=released, anchor_weights=weights)
        counted = torch.isfinite(run.lse[1, : run.active]).sum() == 0
        assert counted and run.row_loss.isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_upstream_of_any_size(scale: float, every_isa: str) -> None:
    """The gradient is linear in the upstream one, to the bit for powers of two."""
    x, labels, weights = make(7, 2, 5, 19)
    power = 2.0 ** round(math.log2(scale))
    plain, scaled = Run(x, labels, anchor_weights=weights), Run(x, labels, anchor_weights=weights * power)
    assert torch.equal(scaled.grad, plain.grad * power)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_every_run(threads: int, every_isa: str) -> None:
    x, labels, weights = make(60, 2, 20, 48, density=0.3)
    first = Run(x, labels, threads=threads, anchor_weights=weights)
    for _ in range(4):
        again = Run(x, labels, threads=threads, anchor_weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))


@functools.cache
def budgets(shape: tuple[int, ...], temperature: float) -> tuple[Budget, ...]:
    """What the library's oracle says of loss and gradient of ``make(*shape)``."""
    x, labels, weights = make(*shape)
    run = lambda x: reference.sscl(x, labels, temperature)  # noqa: E731
    return error_budgets(lambda: value_and_grads(run, x.double(), upstream=weights.double()), draws=6)


@pytest.mark.budget
@pytest.mark.parametrize("temperature", [0.2, 0.07])
@pytest.mark.parametrize(
    "shape",
    [
        (40, 2, 12, 64),
        *(pytest.param(size, marks=pytest.mark.published) for size in [(90, 2, 16, 257), (60, 1, 20, 1024)]),
    ],
)
def test_error_budget(shape, temperature: float, every_isa: str) -> None:
    x, labels, weights = make(*shape)
    run = Run(x, labels, temperature, anchor_weights=weights)
    loss, gradient = budgets(shape, temperature)
    assert_within_budget("loss", run.row_loss, loss)
    assert_within_budget("gradient", run.grad, gradient)
