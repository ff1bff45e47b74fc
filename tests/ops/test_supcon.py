"""Single-label supervised contrastive loss: every backend against the oracle, and against SSCL."""

from __future__ import annotations

import functools

import pytest
import torch

from sadcl import SupConLoss
from sadcl import functional as F
from sadcl.testing import make_features, value_and_grads
from tests.here import backends_here

BACKENDS = backends_here("sscl")


def unit_features(b: int, v: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.nn.functional.normalize(make_features(b, v, d, dtype=dtype), dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("labels", ["none", "few", "unique", "equal", "negative"])
def test_matches_the_oracle(labels: str, contrast_mode: str, backend: str) -> None:
    x = unit_features(9, 2, 17)
    groups = {
        "none": None,
        "few": torch.tensor([3, 1, 3, 0, 1, 3, 7, 0, 3]),
        "unique": torch.randperm(9),
        "equal": torch.full((9, 1), 5),
        "negative": torch.tensor([-4.0, 2.5, -4.0, 0.0, 0.0, 2.5, -1.0, -4.0, 9.0]),
    }[labels]
    run = functools.partial(F.supcon_loss, labels=groups, contrast_mode=contrast_mode, base_temperature=0.1)
    for reduction in ("mean", "sum", "none"):
        size = (9, 1 if contrast_mode == "one" else 2)
        upstream = torch.randn(size, dtype=torch.float64) if reduction == "none" else None
        got, want = (
            value_and_grads(lambda x, n=name, r=reduction: run(x, reduction=r, backend=n), x, upstream=upstream)
            for name in (backend, "reference")
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", backends_here("mlc"))
def test_mask_may_be_asymmetric_and_weighted(backend: str) -> None:
    x = unit_features(5, 2, 8)
    mask = torch.rand(5, 5).double() * (torch.rand(5, 5) < 0.6)
    mask[2] = 0  # an image without a positive
    tau = torch.tensor(0.2, dtype=torch.float64)
    for v in (1, 2):
        got, want = (
            value_and_grads(
                lambda x, w, t, n=n: F.supcon_loss(x, mask=w, temperature=t, backend=n), x[:, :v], mask, tau
            )
            for n in (backend, "reference")
        )
        torch.testing.assert_close(got, want)
    rows = F.supcon_loss(x, mask=mask, reduction="none", backend=backend)
    assert (rows[2] == 0).all() and (rows[:2] > 0).all()
    for wrong in (-0.5, float("nan"), float("inf")):
        mask[1, 3] = wrong
        with pytest.raises(ValueError, match="mask: expected finite numbers >= 0"):
            F.supcon_loss(x, mask=mask, backend=backend)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.bfloat16])
def test_mask_of_any_dtype(kind: torch.dtype) -> None:
    x, mask = unit_features(7, 2, 8, torch.float32), torch.rand(7, 7) < 0.5
    want = F.supcon_loss(x.double(), mask=mask, backend="reference")
    torch.testing.assert_close(F.supcon_loss(x, mask=mask.to(kind)), want.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(F.supcon_loss(x, mask=mask.to(kind)), want.float())


def test_mask_of_a_partition_is_labels() -> None:
    x, labels = unit_features(6, 2, 8), torch.tensor([0, 1, 0, 2, 1, 0])
    torch.testing.assert_close(F.supcon_loss(x, labels), F.supcon_loss(x, mask=(labels[:, None] == labels).double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_sscl_is_supcon_of_normalised_features(backend: str) -> None:
    x, labels = make_features(7, 2, 12, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    one_hot = torch.nn.functional.one_hot(labels)
    spread = x[:, :, None].expand(7, 2, 3, 12)
    sscl = F.sample_contrastive_loss(spread, one_hot, temperature=0.3, backend=backend)
    z = torch.nn.functional.normalize(x, dim=-1)
    supcon = F.supcon_loss(z, labels, temperature=0.3, base_temperature=None, backend=backend)
    torch.testing.assert_close(sscl, supcon)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_not_normalised_again_and_stay_finite(backend: str) -> None:
    x, labels = 20 * unit_features(6, 1, 8, torch.float32), torch.tensor([0, 1, 0, 1, 1, 0])
    got = value_and_grads(lambda x: F.supcon_loss(x, labels, backend=backend), x)
    want = value_and_grads(lambda x: F.supcon_loss(x, labels, backend="reference"), x.double())
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


def test_module_has_the_well_known_signature() -> None:
    x, labels = unit_features(4, 2, 8), torch.tensor([0, 1, 0, 1])
    loss = SupConLoss(temperature=0.1, contrast_mode="all", base_temperature=0.07)
    want = F.supcon_loss(x, labels, temperature=0.1)
    assert torch.equal(loss(x, labels), want) and torch.equal(loss(x, labels=labels, mask=None), want)
    assert torch.equal(loss(x.unflatten(2, (2, 4)), labels), want)  # trailing dimensions are flattened
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    rows = SupConLoss(0.1, reduction="none")(x, labels)
    torch.testing.assert_close(loss(x, labels, sample_weight=weight), (rows * weight[:, None]).mean())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": torch.zeros(4), "mask": torch.eye(4)}, "at most one of them, got both"),
        ({"labels": torch.zeros(3)}, r"labels: expected B=4 \(from features\)"),
        ({"labels": torch.zeros(4, 2)}, r"labels: expected columns=1"),
        ({"mask": torch.zeros(4, 3)}, "mask: expected B=4"),
        ({"contrast_mode": "some"}, "contrast_mode: expected one of all, one, got 'some'"),
        ({"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
        ({"base_temperature": -1.0}, "base_temperature: expected a finite number > 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.supcon_loss(torch.randn(4, 2, 8), **arguments)
