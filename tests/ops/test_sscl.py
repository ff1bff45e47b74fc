"""Sample-to-sample contrastive loss: every backend against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadcl import SampleContrastiveLoss, reference
from sadcl import functional as F
from sadcl.testing import (
    RAGGED,
    Budget,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)
from tests.here import backends_here

BACKENDS = backends_here("sscl")
SIZES = [(5, 1, 7, 63), (6, 2, 9, 100), (4, 3, 5, 257), (3, 2, 4, 1)]


def rows_loss(features: torch.Tensor, labels: torch.Tensor, **options: object) -> torch.Tensor:
    return F.sample_contrastive_loss(features, labels, reduction="none", **options)


@functools.cache
def problem(
    size: tuple[int, ...], pattern: str, dtype: torch.dtype, temperature: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Budget, ...]]:
    """Features, labels, upstream gradient, and what the oracle says of loss and gradient."""
    b, v, c, d = size
    features, labels = make_features(b, v, c, d, dtype=dtype), make_labels(b, c, pattern)
    upstream = torch.randn(b, v, c)

    def oracle() -> tuple[torch.Tensor, ...]:
        run = lambda x: reference.sscl(x, labels, temperature)  # noqa: E731
        return value_and_grads(run, features.double(), upstream=upstream.double())

    return features, labels, upstream, error_budgets(oracle)


@pytest.mark.budget
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_error_budget(size: tuple[int, ...], pattern: str, dtype: torch.dtype, backend: str) -> None:
    features, labels, upstream, budgets = problem(size, pattern, dtype)
    with poisoned_allocations():
        ours = value_and_grads(lambda x: rows_loss(x, labels, backend=backend), features, upstream=upstream)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for name, got, want in zip(("loss", "gradient"), ours, budgets, strict=True):
        assert_within_budget(name, got, want)


@functools.cache
def mean_problem(pattern: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, tuple[Budget, ...]]:
    """Features, labels, and what the oracle says of the mean and its gradients."""
    features, labels = make_features(6, 2, 9, 100, dtype=dtype), make_labels(6, 9, pattern)
    count = max(2 * int((labels == 1).sum()), 1)

    def oracle() -> tuple[torch.Tensor, ...]:
        run = lambda x, t: reference.sscl(x, labels, t).sum() / count  # noqa: E731
        return value_and_grads(run, features.double(), torch.tensor(0.2).double(), upstream=torch.tensor(1.7).double())

    return features, labels, error_budgets(oracle)


@pytest.mark.budget
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_within_the_error_budget(pattern: str, dtype: torch.dtype, backend: str) -> None:
    """It has an op of its own, which knows that all rows weigh the same."""
    features, labels, budgets = mean_problem(pattern, dtype)
    run = functools.partial(F.sample_contrastive_loss, labels=labels, backend=backend)
    with poisoned_allocations():
        ours = value_and_grads(
            lambda x, t: run(x, temperature=t), features, torch.tensor(0.2), upstream=torch.tensor(1.7)
        )
    assert ours[0].shape == () and ours[1].dtype == dtype
    for name, got, want in zip(("loss", "gradient", "temperature"), ours, budgets, strict=True):
        assert_within_budget(name, got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_where_rows_are_alone_or_zero_and_its_graph_kept(backend: str) -> None:
    features, labels = make_features(4, 1, 3, 9, dtype=torch.float64), torch.zeros(4, 3)
    run = functools.partial(F.sample_contrastive_loss, labels=labels)
    for at in ([], [(1, 2)], [(1, 2), (0, 1)], [(1, 2), (3, 2), (0, 1)]):  # none, one, two without positives, a pair
        for image, label in at:
            labels[image, label] = 1
        features[1, 0, 2] = 0.0
        x = features.clone().requires_grad_()
        loss = run(x, backend=backend)
        first, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        want = value_and_grads(lambda x: run(x, backend="reference"), features)
        torch.testing.assert_close((loss.detach(), first), tuple(want), rtol=1e-10, atol=1e-12)
        assert torch.equal(first, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
def test_float64_matches_the_oracle(formulation: str, pattern: str, backend: str) -> None:
    features, labels = make_features(6, 2, 5, 33, dtype=torch.float64), make_labels(6, 5, pattern)
    upstream = torch.randn(6, 2, 5, dtype=torch.float64)
    run = functools.partial(rows_loss, labels=labels, formulation=formulation, temperature=0.1, base_temperature=0.2)
    got = value_and_grads(lambda x: run(x, backend=backend), features, upstream=upstream)
    want = value_and_grads(lambda x: run(x, backend="reference"), features, upstream=upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_agree_bit_for_bit(backend: str) -> None:
    features, labels = make_features(5, 2, 7, 40), make_labels(5, 7)
    want = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), features)
    for name, layout in layouts(features):
        got = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), layout)
        assert torch.equal(got[0], want[0]), name
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_views(backend: str) -> None:
    one, labels = make_features(4, 1, 6, 20), make_labels(4, 6)
    want = value_and_grads(lambda x: F.sample_contrastive_loss(x.repeat(1, 2, 1, 1), labels, backend=backend), one)
    got = value_and_grads(lambda x: F.sample_contrastive_loss(x.expand(4, 2, 6, 20), labels, backend=backend), one)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_dimensions_are_one_view(backend: str) -> None:
    features, labels = make_features(5, 7, 16), make_labels(5, 7)
    got = F.sample_contrastive_loss(features, labels, backend=backend)
    assert torch.equal(got, F.sample_contrastive_loss(features[:, None], labels, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_weights(backend: str) -> None:
    features, labels = make_features(6, 2, 5, 16), make_labels(6, 5, "ignored", seed=3)
    class_weight, sample_weight = torch.rand(5), torch.rand(6)
    rows = rows_loss(features, labels, backend=backend)
    assert (rows[(labels != 1)[:, None].expand_as(rows)] == 0).all()
    run = functools.partial(F.sample_contrastive_loss, features, labels, backend=backend)
    torch.testing.assert_close(run(reduction="sum"), rows.sum())
    torch.testing.assert_close(run(), rows.sum() / (2 * (labels == 1).sum()))
    weighted = rows * class_weight * sample_weight[:, None, None]
    torch.testing.assert_close(
        run(class_weight=class_weight, sample_weight=sample_weight), weighted.sum() / (2 * (labels == 1).sum())
    )


@pytest.mark.parametrize("backend", backends_here("sscl", "reference"))
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
def test_temperature_gradient(formulation: str, backend: str) -> None:
    features, labels = make_features(5, 2, 4, 12, dtype=torch.float64), make_labels(5, 4, labels_per_image=2)

    def loss(temperature: torch.Tensor) -> torch.Tensor:
        return rows_loss(features, labels, temperature=temperature, backend=backend).square().sum()

    if formulation == "paper":
        assert torch.autograd.gradcheck(loss, torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
    else:
        # r and R are constants in the gradient, so the numbers are the oracle's, not the finite difference's.
        tau = torch.tensor(0.3, dtype=torch.float64)
        run = functools.partial(rows_loss, features, labels, formulation="released")
        got = value_and_grads(lambda t: run(temperature=t, backend=backend).sum(), tau)
        want = value_and_grads(lambda t: run(temperature=t, backend="reference").sum(), tau)
        torch.testing.assert_close(got, want)


@pytest.mark.budget
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
def test_cold_and_warm_temperatures(temperature: float, backend: str) -> None:
    features, labels, upstream, budgets = problem((6, 2, 9, 64), "random", torch.float32, temperature)
    run = functools.partial(rows_loss, labels=labels, temperature=temperature, backend=backend)
    ours = value_and_grads(run, features, upstream=upstream)
    for name, got, want in zip(("loss", "gradient"), ours, budgets, strict=True):
        assert_within_budget(name, got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-40])
def test_extreme_magnitudes_have_the_same_loss(scale: float, backend: str) -> None:
    features, labels = make_features(5, 2, 6, 32), make_labels(5, 6)
    scaled = (features.double() * scale).float()
    want = reference.sscl(scaled, labels, 0.2).sum()
    got = rows_loss(scaled, labels, backend=backend).sum()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", backends_here("sscl", "reference"))
def test_zero_vectors(backend: str) -> None:
    features, labels = make_features(4, 1, 3, 8), make_labels(4, 3, "all_active")
    features[1, 0, 2] = 0
    loss, grad = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), features)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert (grad[1, 0, 2] == 0).all() and (grad[0] != 0).any()


@pytest.mark.parametrize("backend", backends_here("sscl", "reference"))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_counts_only_in_active_rows(value: float, backend: str) -> None:
    features, labels = make_features(4, 1, 3, 8), make_labels(4, 3, "one_huge_class")
    features[2, 0, 0, 5] = value  # class 0 has no active row
    loss, grad = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), features)
    assert torch.isfinite(loss)
    if backend != "reference":
        assert torch.isfinite(grad).all()
    features[2, 0, 1, 5] = value
    assert F.sample_contrastive_loss(features, labels, backend=backend).isnan()


@pytest.mark.parametrize("backend", backends_here("sscl", "reference"))
@pytest.mark.parametrize("pattern", ["none", "single_pair", "one_row_per_class"])
def test_nothing_to_attract_is_zero_and_connected(pattern: str, backend: str) -> None:
    features, labels = make_features(9, 1, 4, 8), make_labels(9, 4, pattern)
    loss, grad = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), features)
    assert loss == 0 and (grad == 0).all()
    stats = F.contrastive_stats(labels)
    assert stats.anchors == 0 and stats.positives == 0


def test_stats_count_anchors_and_positives() -> None:
    labels = torch.tensor([[1, 0, -1], [1, 1, 0], [1, 0, 0]])
    stats = SampleContrastiveLoss().stats(labels, views=2)
    assert stats.anchors.item() == 6 + 2
    assert stats.positives.item() == 6 * 5 + 2 * 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_run(backend: str) -> None:
    features, labels = make_features(16, 2, 20, 64), make_labels(16, 20)
    runs = [
        value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend=backend), features) for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 8),
    v=st.integers(1, 3),
    c=st.integers(1, 9),
    d=st.integers(1, 70),
    pattern=st.sampled_from(RAGGED),
    tau=st.floats(0.05, 2.0),
    seed=st.integers(0, 1000),
)
def test_any_problem(backend: str, b: int, v: int, c: int, d: int, pattern: str, tau: float, seed: int) -> None:
    features = make_features(b, v, c, d, dtype=torch.float64, seed=seed)
    labels = make_labels(b, c, pattern, seed=seed)
    upstream = torch.randn(b, v, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for formulation in F.FORMULATIONS:
        run = functools.partial(rows_loss, labels=labels, temperature=tau, formulation=formulation)
        got = value_and_grads(lambda x: run(x, backend=backend), features, upstream=upstream)
        want = value_and_grads(lambda x: run(x, backend="reference"), features, upstream=upstream)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


def test_released_numbers_depend_on_the_order_of_the_batch() -> None:
    """The reason why "paper" is the default: docs/faithfulness.md."""
    features, labels = make_features(6, 2, 5, 16), make_labels(6, 5, seed=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def change(formulation: str) -> float:
        loss = [
            F.sample_contrastive_loss(features[i], labels[i], formulation=formulation) for i in (slice(None), order)
        ]
        return abs(loss[0] - loss[1]).item()

    assert change("paper") < 1e-6 < 1e-2 < change("released")
