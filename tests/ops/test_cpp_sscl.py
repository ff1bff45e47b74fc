"""The CPU extension's SSCL and compaction, called through their bindings and held against float64 numpy.

The oracle below is the equations of sadcl/reference/sscl.py, written densely in numpy; the op layer above has its own
tests.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sadcl import reference
from sadcl.ops._native import DTYPE_CODES, array
from sadcl.testing import Budget, assert_within_budget, error_budgets, value_and_grads

_C = pytest.importorskip("sadcl._C", reason="the CPU extension is not built")

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("sscl_*.npz"))


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Every instruction set of this machine in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A fresh allocation in which whatever is not written stays visible."""
    return (
        torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.full(shape, 77, dtype=dtype)
    )


def compact(labels: Tensor, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    B, C = labels.shape
    pairs, class_ptr = poisoned(B * C, dtype=torch.int32), poisoned(C + 1, dtype=torch.int32)
    target = poisoned(B, C, dtype=torch.int8)
    out = {"pairs": array(pairs), "class_ptr": array(class_ptr), "target": array(target)}
    _C.compact(labels=array(labels), **out, threads=threads)
    return pairs, class_ptr, target


@dataclass
class Run:
    """One forward and backward through the bindings."""

    features: Tensor
    labels: Tensor
    temperature: float = 0.2
    normalize: bool = True
    released: bool = False
    threads: int = 2
    backward_threads: int | None = None
    keep: int | None = None  # scores; as many as the op layer keeps of a small problem
    anchor_weights: Tensor | None = None
    groups: tuple[Tensor, Tensor] | None = None
    row_loss: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    grad_temperature: float = field(init=False)

    def __post_init__(self) -> None:
        x = self.features
        B, V, C, _ = x.shape
        pairs, class_ptr = self.groups or compact(self.labels)[:2]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = V * pairs.numel()
        self.row_loss, self.lse = poisoned(B, V, C, dtype=acc), poisoned(2, rows, dtype=acc)
        self.norm = poisoned(rows, dtype=torch.float64)
        self.kept = poisoned(min(rows * rows, _C.SSCL_FEW_SCORES) if self.keep is None else self.keep, dtype=acc)
        given = {
            "features": x, "pairs": pairs, "class_ptr": class_ptr,
            "temperature": torch.tensor(self.temperature, dtype=torch.float64),
            "lse": self.lse, "norm": self.norm, "kept": self.kept,
        }  # fmt: skip
        arrays = {name: array(tensor) for name, tensor in given.items()} | {"normalize": self.normalize}
        _C.sscl_forward(**arrays, released=self.released, row_loss=array(self.row_loss), threads=self.threads)
        if self.anchor_weights is None:
            self.anchor_weights = torch.full((B, V, C), 1 / max(V * int(class_ptr[-1]), 1), dtype=acc)
        self.grad = poisoned(*x.shape, dtype=x.dtype)
        grad_temperature = poisoned(dtype=torch.float64)
        _C.sscl_backward(
            **arrays,
            grad_row_loss=array(self.anchor_weights),
            grad_features=array(self.grad),
            grad_temperature=array(grad_temperature),
            threads=self.backward_threads or self.threads,
        )
        self.grad_temperature = grad_temperature.item()
        self.active = V * int(class_ptr[-1])

    def tensors(self) -> list[Tensor]:
        return [self.row_loss, self.lse, self.norm, self.kept, self.grad, torch.tensor(self.grad_temperature)]


@dataclass
class Truth:
    row_loss: np.ndarray
    lse: np.ndarray
    grad: np.ndarray
    grad_temperature: float


def oracle(x, labels, temperature, weights, normalize=True, released=False, group_of=None) -> Truth:
    """Both formulations in float64 with every N x N matrix written out; weights [B, V, C] are dL/drow_loss."""
    x = np.asarray(x, np.float64)
    B, V, C, D = x.shape
    place = [(b, v, c) for c in range(C) for b in range(B) if labels[b, c] == 1 for v in range(V)]
    if group_of is not None:
        place.sort(key=lambda p: (group_of[p[0]], p[0], p[1]))
    row_loss, grad = np.zeros((B, V, C)), np.zeros_like(x)
    n = len(place)
    if n == 0:
        return Truth(row_loss, np.zeros(0), grad, 0.0)
    at = tuple(np.array(place).T)
    rows = x[at]
    norm = np.sqrt((rows**2).sum(1)) if normalize else np.ones(n)
    z = np.divide(rows, norm[:, None], out=np.zeros_like(rows), where=norm[:, None] > 0)
    s = z @ z.T / temperature
    group = at[2] if group_of is None else np.array(group_of)[at[0]]
    other = ~np.eye(n, dtype=bool)
    positive = (group[:, None] == group[None, :]) & other
    k = positive.sum(1)
    has = k > 0
    hidden = np.where(other, s, -np.inf)
    peak = np.maximum(hidden.max(1), 0) if released else np.where(n > 1, hidden.max(1), 0.0)
    total = np.exp(hidden - peak[:, None]).sum(1) + (1e-5 if released else 0.0)
    with np.errstate(divide="ignore"):
        lse = np.where(has, peak + np.log(total), np.inf)
    lifted = np.zeros((n, n))
    if released:
        for i in range(n):
            for p in np.flatnonzero(positive[i]):
                (b, v, _), (b2, v2, _) = place[i], place[p]
                shared = [c for c in range(C) if labels[b, c] == 1 and labels[b2, c] == 1]
                scores = [s[place.index((b, v, c)), place.index((b2, v2, c))] for c in shared]
                lifted[i, p] = max(scores + ([0.0] if len(shared) < C else []))
    mean = np.where(positive, s - lifted, 0).sum(1) / np.maximum(k, 1)
    row_loss[at] = np.where(has, lse - (peak if released else 0) - mean, 0) if has.any() else 0
    m = np.where(has, np.asarray(weights, np.float64)[at], 0)
    a = np.where(other, m[:, None] * np.exp(np.where(has[:, None], hidden - lse[:, None], -np.inf)), 0)
    a -= np.where(positive, m[:, None] / np.maximum(k, 1)[:, None], 0)
    g = (a + a.T) @ z / temperature
    radial = (z * g).sum(1)
    if normalize:
        g = np.divide(g - z * radial[:, None], norm[:, None], out=np.zeros_like(g), where=norm[:, None] > 0)
    grad[at] = g
    return Truth(row_loss, lse, grad, -radial.sum() / (2 * temperature))


def close(got: Tensor, want: np.ndarray, relative: float, floor: float = 1e-6) -> None:
    """Row by row: each row's error against its largest value plus what its terms were before they cancelled."""
    got = got.double().numpy()
    assert np.isfinite(got).all()
    rows_got, rows_want = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
    error = np.abs(rows_got - rows_want).max(1)
    scale = np.abs(rows_want).max(1) + 1e-2 * np.abs(rows_want).max() + floor
    assert (error <= relative * scale).all(), (error / scale).max()


def check(run: Run, truth: Truth, relative: float) -> None:
    n = run.active
    close(run.row_loss, truth.row_loss, relative, 0.1)
    pivot, log_sum = run.lse[:, :n].double().numpy()
    got = pivot / run.temperature + log_sum
    assert (np.isinf(got) == np.isinf(truth.lse)).all()
    np.testing.assert_allclose(got[np.isfinite(got)], truth.lse[np.isfinite(truth.lse)], rtol=relative, atol=relative)
    assert not run.lse[:, n:].any() and not run.norm[n:].any()
    lengths = run.norm[:n][run.norm[:n] > 0]
    terms = run.anchor_weights.abs().max().item() / run.temperature / (lengths.min().item() if len(lengths) else 1)
    close(run.grad, truth.grad, relative, 0.1 * terms)
    assert math.isclose(run.grad_temperature, truth.grad_temperature, rel_tol=5 * relative, abs_tol=5 * relative)


def make(B: int, V: int, C: int, D: int, density: float = 0.4, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, V, C, D, generator=g, dtype=torch.float64)
    x = x + 0.7 * torch.randn(1, 1, C, D, generator=g, dtype=torch.float64)  # classes differ
    labels = (torch.rand(B, C, generator=g) < density).to(torch.uint8)
    weights = torch.rand(B, V, C, generator=g, dtype=torch.float64) / (B * V)
    return x.to(dtype), labels, weights.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.skipif(not GOLDEN, reason="no golden files")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_paper(path: Path, isa: str) -> None:
    data = np.load(path)
    run = Run(torch.from_numpy(data["features"]), torch.from_numpy(data["labels"]), float(data["temperature"]))
    loss = run.row_loss.double().sum().item() / max(run.active, 1)
    assert abs(loss - data["paper_loss"]) <= 1e-5 * max(abs(data["paper_loss"]), 0.3)
    want = data["paper_grad"].astype(np.float64)
    assert np.linalg.norm(run.grad.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3)


@pytest.mark.skipif(not GOLDEN, reason="no golden files")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_released(path: Path, isa: str) -> None:
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


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 1), (4, 2, 5, 7), (5, 3, 6, 63), (6, 1, 9, 100), (4, 2, 3, 257), (30, 2, 9, 33)]
)
def test_matches_oracle(shape, released: bool, threads: int, isa: str) -> None:
    x, labels, weights = make(*shape)
    run = Run(x, labels, threads=threads, released=released, anchor_weights=weights)
    check(run, oracle(x, labels, 0.2, weights, released=released), 2e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.024, 0.005])
def test_temperature(temperature: float, isa: str) -> None:
    x, labels, weights = make(12, 2, 5, 40)  # 0.024 and 0.005: beyond the fixed shift
    check(Run(x, labels, temperature, anchor_weights=weights), oracle(x, labels, temperature, weights), 1e-4)


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_without_normalisation(size: float, isa: str) -> None:
    x, labels, weights = make(10, 2, 5, 17)
    x = x * (size / 4)
    largest_score = (x.double() ** 2).sum(
        -1
    ).max().item() / 0.2  # 40 or 4,000: a float32 score is off by an ulp of that
    run = Run(x, labels, 0.2, normalize=False, anchor_weights=weights)
    check(run, oracle(x, labels, 0.2, weights, normalize=False), 1e-5 + largest_score * 2.0**-23)


@pytest.mark.parametrize("shape", [(5, 2, 6, 13), (40, 2, 5, 9)])
def test_float64(shape, isa: str) -> None:
    x, labels, weights = make(*shape, dtype=torch.float64)
    for released in (False, True):
        run = Run(x, labels, 0.07, released=released, anchor_weights=weights)
        check(run, oracle(x, labels, 0.07, weights, released=released), 1e-12)


@pytest.mark.parametrize("dtype,relative", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_types(dtype: torch.dtype, relative: float, isa: str) -> None:
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
def test_ragged(case: str, views: int, isa: str) -> None:
    x, labels, weights = make(8, views, 7, 31)
    RAGGED[case](labels)
    for released in (False, True):
        run = Run(x, labels, released=released, anchor_weights=weights)
        check(run, oracle(x, labels, 0.2, weights, released=released), 2e-5)


@pytest.mark.parametrize("keep", [None, 0])
@pytest.mark.parametrize("rows", [500, 512, 520, 1300])
def test_around_the_limit_of_few_scores(rows: int, keep: int | None, isa: str) -> None:
    x, labels, weights = make(rows // 4, 1, 8, 24, density=0.0)
    labels.view(-1)[torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(1))[:rows]] = 1
    run = Run(x, labels, keep=keep, anchor_weights=weights)
    assert run.active == rows
    check(run, oracle(x, labels, 0.2, weights), 3e-5)
    assert torch.isfinite(run.kept).all() and run.kept[: rows * rows].any() == (keep is None)
    assert not run.kept[rows * rows :].any()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_scores_change_nothing(dtype: torch.dtype, released: bool, isa: str) -> None:
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
def test_there_is_room_for_the_scores_that_are_worth_keeping(dtype: torch.dtype, isa: str) -> None:
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


def test_released_maxima_in_stripes(isa: str) -> None:
    """Over the kept-scores limit with several stripes of images: against the same rows in float64."""
    x, labels, weights = make(150, 2, 6, 8, density=0.5)
    labels[:3] = 1
    single = Run(x, labels, released=True, anchor_weights=weights, keep=0)
    assert single.active > 512
    double = Run(x.double(), labels, released=True, anchor_weights=weights.double(), keep=0)
    close(single.row_loss, double.row_loss.numpy(), 2e-5)


def test_strided_and_expanded(isa: str) -> None:
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


def test_inactive_rows_are_never_read(isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    plain = Run(x, labels, anchor_weights=weights)
    x[(labels == 0)[:, None, :].expand(6, 2, 5)] = float("nan")
    assert torch.equal(Run(x, labels, anchor_weights=weights).grad, plain.grad)


def test_groups_other_than_classes(isa: str) -> None:
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
def test_extreme_features(scale: float, isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    x = (x.double() * scale).float()
    run, truth = Run(x, labels, anchor_weights=weights), oracle(x, labels, 0.2, weights)
    close(run.row_loss, truth.row_loss, 1e-5)
    if np.abs(truth.grad).max() < 3e38 and np.abs(truth.grad).max() > 1e-37:
        close(run.grad / np.abs(truth.grad).max(), truth.grad / np.abs(truth.grad).max(), 2e-5)


def test_zero_rows(isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    labels[0] = 1
    x[0] = 0
    run = Run(x, labels, anchor_weights=weights)
    check(run, oracle(x, labels, 0.2, weights), 2e-5)
    assert not run.grad[0].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_non_finite_rows_give_nan(poison: float, temperature: float, isa: str) -> None:
    x, labels, weights = make(6, 2, 5, 19)
    labels[1, 2] = 1
    x[1, 0, 2, 3] = poison
    for released in (False, True):
        run = Run(x, labels, temperature, released=released, anchor_weights=weights)
        counted = torch.isfinite(run.lse[1, : run.active]).sum() == 0
        assert counted and run.row_loss.isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_upstream_of_any_size(scale: float, isa: str) -> None:
    """The gradient is linear in the upstream one, to the bit for powers of two."""
    x, labels, weights = make(7, 2, 5, 19)
    power = 2.0 ** round(math.log2(scale))
    plain, scaled = Run(x, labels, anchor_weights=weights), Run(x, labels, anchor_weights=weights * power)
    assert torch.equal(scaled.grad, plain.grad * power)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_every_run(threads: int, isa: str) -> None:
    x, labels, weights = make(60, 2, 20, 48, density=0.3)
    first = Run(x, labels, threads=threads, anchor_weights=weights)
    for _ in range(4):
        again = Run(x, labels, threads=threads, anchor_weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize("dtype,low", [(torch.float32, -126.0), (torch.float64, -1022.0)])
def test_exponential(dtype: torch.dtype, low: float, isa: str) -> None:
    """One unit in the last place of the result with FMA, one and a half without, as csrc/simd.h states."""
    g = torch.Generator().manual_seed(0)
    near = torch.randn(200_000, generator=g, dtype=torch.float64)
    x = torch.cat([near, torch.linspace(low, -low, 200_001, dtype=torch.float64)]).to(dtype)
    out = torch.empty_like(x)
    _C.exp2(array(x), array(out))
    want = np.exp2(x.numpy().astype(np.longdouble))
    unit = np.spacing(want.astype(x.numpy().dtype)).astype(np.longdouble)
    assert (np.abs(out.numpy() - want) / unit).max() <= (1.5 if isa == "portable" else 1.0)
    edges = torch.tensor([-math.inf, -1e30, low * 1.01, 0.0, math.nan], dtype=dtype)
    out = torch.empty_like(edges)
    _C.exp2(array(edges), array(out))
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 1.0] and out[4].isnan()


@functools.cache
def budgets(shape: tuple[int, ...], temperature: float) -> tuple[Budget, ...]:
    """What the library's oracle says of loss and gradient of ``make(*shape)``."""
    x, labels, weights = make(*shape)
    run = lambda x: reference.sscl(x, labels, temperature)  # noqa: E731
    return error_budgets(lambda: value_and_grads(run, x.double(), upstream=weights.double()), draws=6)


@pytest.mark.parametrize("temperature", [0.2, 0.07])
@pytest.mark.parametrize("shape", [(40, 2, 12, 64), (90, 2, 16, 257), (60, 1, 20, 1024)])
def test_error_budget(shape, temperature: float, isa: str) -> None:
    x, labels, weights = make(*shape)
    run = Run(x, labels, temperature, anchor_weights=weights)
    loss, gradient = budgets(shape, temperature)
    assert_within_budget("loss", run.row_loss, loss)
    assert_within_budget("gradient", run.grad, gradient)


# --- compaction ---


def compact_oracle(labels: np.ndarray):
    B, C = labels.shape
    columns = [[b * C + c for b in range(B) if labels[b, c] == 1] for c in range(C)]
    flat = [p for column in columns for p in column]
    return flat + [0] * (B * C - len(flat)), [0, *np.cumsum([len(column) for column in columns])]


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 80), (7, 1), (1, 19), (257, 300)])
@pytest.mark.parametrize("threads", [1, 3])
def test_compact(dtype: torch.dtype, shape: tuple[int, int], threads: int) -> None:
    choices = [0, 1] if dtype in (torch.bool, torch.uint8) else [-1, 0, 0, 1]
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice(choices, size=shape))
    for layout in (labels.to(dtype), labels.to(dtype).t().contiguous().t()):
        pairs, class_ptr, target = compact(layout, threads)
        want_pairs, want_ptr = compact_oracle(labels.numpy())
        assert pairs.tolist() == want_pairs and class_ptr.tolist() == want_ptr
        assert torch.equal(target, labels.to(torch.int8))


def test_compact_expanded() -> None:
    labels = torch.tensor([1, 0, -1, 1]).expand(3, 4)
    pairs, class_ptr, _ = compact(labels)
    assert pairs.tolist()[:6] == [0, 4, 8, 3, 7, 11] and class_ptr.tolist() == [0, 3, 3, 3, 6]


@pytest.mark.parametrize(
    "labels,shown",
    [
        (torch.tensor([[0.5, 1.0], [2.0, 0.5]]), "got values 0.5, 2$"),
        (torch.tensor([[float("nan"), 1.0]]), "got values nan$"),
        (torch.tensor([[float("nan"), 0.25]], dtype=torch.float16), "got values nan, 0.25$"),
        (torch.tensor([[1, 3]], dtype=torch.bfloat16), "got values 3$"),
        (torch.tensor([[-2, 255]]), "got values -2, 255$"),
        (torch.tensor([[255]], dtype=torch.uint8), "got values 255$"),
        (torch.arange(2, 10)[None], r"got values 2, 3, 4, 5, 6, \.\.\.$"),
    ],
)
def test_compact_names_bad_values(labels: Tensor, shown: str) -> None:
    with pytest.raises(ValueError, match=r"^labels: expected 0, 1 or -1 \(ignored\), " + shown):
        compact(labels)


# --- the door ---


def test_bad_arguments_name_themselves() -> None:
    x, labels, _ = make(3, 1, 4, 5)
    pairs, class_ptr, _ = compact(labels)
    row_loss, lse, norm = torch.empty(3, 1, 4), torch.empty(2, 12), torch.empty(12, dtype=torch.float64)

    def call(x=x, pairs=pairs, class_ptr=class_ptr, temperature=0.2, lse=lse, norm=norm):
        given = {
            "features": x, "pairs": pairs, "class_ptr": class_ptr, "temperature": torch.tensor(temperature),
            "row_loss": row_loss, "lse": lse, "norm": norm, "kept": torch.empty(0),
        }  # fmt: skip
        arrays = {name: array(tensor) for name, tensor in given.items() if tensor is not None}
        _C.sscl_forward(**arrays, normalize=True, released=False, threads=1)

    call()
    with pytest.raises(TypeError, match="^norm: missing"):
        call(norm=None)
    with pytest.raises(ValueError, match="^temperature: expected a finite number > 0"):
        call(temperature=0.0)
    with pytest.raises(TypeError, match="^norm: expected float64, got float32"):
        call(norm=lse)
    with pytest.raises(ValueError, match="^lse: expected 24 contiguous elements, got shape \\[2, 11\\]"):
        call(lse=lse[:, :11])
    with pytest.raises(ValueError, match="^pairs: expected values in \\[0, 12\\)"):
        call(pairs=pairs + 100)
    with pytest.raises(ValueError, match="^class_ptr: expected to start at 0"):
        call(class_ptr=class_ptr + 1)
    with pytest.raises(ValueError, match=r"^features: expected 4 dimensions, got shape \[3, 4, 5\]"):
        call(x=x[:, 0])


def test_isa_is_forced_by_the_environment() -> None:
    def isa_with(value: str) -> subprocess.CompletedProcess:
        # By path: importing the package would import torch, seconds that this test does not need.
        code = (
            "import importlib.util as u; s = u.spec_from_file_location('sadcl._C', %r);"
            "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.isa())"
        )
        return subprocess.run(
            [sys.executable, "-c", code % _C.__file__],
            env={**os.environ, "SADCL_CPU_ISA": value},
            capture_output=True,
            text=True,
        )

    for name in _C.supported_isas():
        assert isa_with(name).stdout.strip() == name
    wrong = isa_with("mmx")
    assert wrong.returncode != 0 and "SADCL_CPU_ISA: expected one of" in wrong.stderr and "'mmx'" in wrong.stderr


def test_unknown_isa() -> None:
    with pytest.raises(ValueError, match="^isa: expected one of .*portable, got 'mmx'"):
        _C.set_isa("mmx")
    info = _C.build_info()
    assert set(_C.supported_isas()) <= set(info["isas"]) and isinstance(info["openmp"], bool)
