"""Torch's operators take a batch by parts on a CPU: whatever the parts are, and however rare labels are, one result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.portable import asl, mlc, pscl, sscl, zlpr
from sadcl.testing import value_and_grads

SHAPES = [(13, 37), (200, 1), (1, 300)]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (asl, zlpr):
        monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(pscl, "_CHUNK", {"cpu": 256})
    monkeypatch.setattr(mlc, "_BLOCK_ELEMENTS", {"cpu": 64})


def problem(shape: tuple[int, int], share: float) -> tuple[Tensor, Tensor]:
    """Logits, and labels, a share of them positive, a share ignored (where NaN stands); the first images have none."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    draw = torch.rand(shape, generator=generator)
    labels = (draw < share).float() - (draw > 1 - share / 2).float()
    labels[: shape[0] // 3] = 0
    return logits.masked_fill(labels == -1, float("nan")), labels


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, options",
    [
        ("asymmetric_loss", {}),
        ("asymmetric_loss", {"clip": 0.0, "eps": 0.2}),
        ("asymmetric_loss", {"gamma_neg": 0, "gamma_pos": 0}),
        ("asymmetric_loss", {"gamma_neg": 2, "detach_focal_weight": True}),
        ("asymmetric_loss", {"gamma_neg": 0.5, "clip": 0.2}),
        ("asymmetric_loss", {"gamma_neg": 3, "clip": 0.01, "eps": 0.02}),  # a floor above the margin
        ("zlpr_loss", {}),
        ("two_way_loss", {}),
    ],
)
def test_losses_of_logits(name: str, options: dict[str, float], shape: tuple[int, int], share: float) -> None:
    logits, labels = problem(shape, share)
    reductions = ["mean"] if name == "two_way_loss" else ["none", "mean"]
    for reduction in reductions:
        upstream = None
        if reduction == "none":
            wide = name == "asymmetric_loss"
            upstream = torch.linspace(-1, 2, logits.numel()).view(shape) if wide else torch.linspace(-1, 2, shape[0])
        got, want = (
            value_and_grads(
                lambda x, b=backend: getattr(F, name)(x, labels, reduction=reduction, backend=b, **options).to(x.dtype),
                logits.to(dtype),
                upstream=None if upstream is None else upstream.to(dtype),
            )
            for backend, dtype in (("torch", torch.float32), ("reference", torch.float64))
        )
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("weighting", ["all", "any", "jaccard", "overlap", "simdis", "mulsupcon"])
def test_image_level_losses(weighting: str, ignored: bool) -> None:
    """With labels that nobody ignores the counts of a pair are sums, not products."""
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(19, 6, generator=generator), (torch.rand(19, 5, generator=generator) < 0.4).float()
    if ignored:
        labels[3, 2] = labels[7, 0] = -1
    got, want = (
        value_and_grads(lambda x, b=backend: F.multilabel_supcon_loss(x, labels, weighting=weighting, backend=b), x)
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [2.0, float("inf")])
@pytest.mark.parametrize("most", [0, 1 << 15])
def test_whole_gradient_of_few_features(most: int, upstream: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept or not, what is inactive has no gradient, not even of an infinite upstream number."""
    monkeypatch.setattr(sscl, "_WHOLE_ELEMENTS", most)
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(4, 2, 5, 8, generator=generator), (torch.rand(4, 5, generator=generator) < 0.5).float()

    def run(backend: str, x: Tensor, t: Tensor) -> Tensor:
        return F.sample_contrastive_loss(x, labels, temperature=t, backend=backend)

    got = value_and_grads(lambda x, t: upstream * run("torch", x, t), x, torch.tensor(0.3))
    inactive = (labels == 0)[:, None].expand(4, 2, 5)
    assert (got[1][inactive] == 0).all()
    if upstream == 2.0:
        want = value_and_grads(lambda x, t: upstream * run("reference", x, t), x, torch.tensor(0.3))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [float("nan"), float("inf")])
def test_an_upstream_that_is_not_finite_is_not_hidden(upstream: float) -> None:
    """Also where the gradient that was kept is 0: two rows, each the other's only positive and only pair."""
    x = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[1.0, 0], [1, 0], [0, 0]])
    for backend in ("reference", "torch"):
        _, grad, of_temperature = value_and_grads(
            lambda x, t, b=backend: upstream * F.sample_contrastive_loss(x, labels, temperature=t, backend=b),
            x,
            torch.tensor(0.5),
        )
        assert grad[:2, :, 0].isnan().all() and (grad[2] == 0).all() and (grad[:, :, 1] == 0).all()
        assert of_temperature.isnan()


@pytest.mark.parametrize("most", [0, 1 << 15])
def test_one_view_of_one_number(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temperature's gradient, kept behind the rows', is then as wide as a row."""
    monkeypatch.setattr(sscl, "_WHOLE_ELEMENTS", most)
    labels = torch.zeros(30, 4)
    labels[5] = labels[9] = 1
    x = torch.randn(30, 1, 4, 1, generator=torch.Generator().manual_seed(4))
    got, want = (
        value_and_grads(
            lambda x, t, b=backend: F.sample_contrastive_loss(x, labels, temperature=t, backend=b),
            x,
            torch.tensor(0.5),
        )
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
