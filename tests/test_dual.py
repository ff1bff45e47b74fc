"""The dual loss: its parts, weights and learnable temperatures."""

from __future__ import annotations

import pytest
import torch

from sadcl import AsymmetricLoss, DualContrastiveLoss, PrototypeContrastiveLoss, SampleContrastiveLoss
from sadcl import functional as F
from sadcl.losses import DEFAULT_WEIGHTS
from sadcl.testing import make_features, make_labels


def batch(b: int = 6, c: int = 5, d: int = 16) -> dict[str, torch.Tensor]:
    return {
        "embeddings": make_features(b, c, d, seed=1).requires_grad_(),
        "bank_embeddings": make_features(b, c, d, seed=2).requires_grad_(),
        "prototypes": make_features(1, c, d, seed=3).requires_grad_(),
        "labels": make_labels(b, c, "ignored"),
        "logits": torch.randn(b, c, requires_grad=True),
    }


@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("logits", [True, False])
def test_total_is_the_weighted_sum_of_the_parts(logits: bool, bank: bool, formulation: str) -> None:
    inputs = batch()
    if not bank:
        inputs["bank_embeddings"] = None
    if not logits:
        inputs["logits"] = None
    out = DualContrastiveLoss(3.0, 2.0, 0.5, formulation=formulation)(**inputs)
    views = inputs["embeddings"][:, None]
    if bank:
        views = torch.stack([inputs["embeddings"], inputs["bank_embeddings"]], dim=1)
    labels = inputs["labels"]
    sample = F.sample_contrastive_loss(views, labels, formulation=formulation)
    prototype = F.prototype_contrastive_loss(
        inputs["embeddings"], inputs["prototypes"], labels, formulation=formulation
    )
    total = 3 * sample + 2 * prototype
    torch.testing.assert_close((out.sample, out.prototype), (sample, prototype))
    if logits:
        classification = F.asymmetric_loss(
            inputs["logits"], labels, gamma_neg=4, gamma_pos=0, clip=0, eps=1e-5, detach_focal_weight=True,
            reduction="released",
        )  # fmt: skip
        torch.testing.assert_close(out.classification, classification)
        total = total + 0.5 * classification
    else:
        assert out.classification is None
    torch.testing.assert_close(out.total, total)
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    got, want = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (out.total, total))
    torch.testing.assert_close(got, want)


def test_default_weights_belong_to_the_formulation() -> None:
    released, paper = DualContrastiveLoss(formulation="released"), DualContrastiveLoss()
    assert (released.sample_weight, released.prototype_weight, released.classification_weight) == (100, 50, 1)
    assert (paper.sample_weight, paper.prototype_weight, paper.classification_weight) == DEFAULT_WEIGHTS["paper"]
    assert DualContrastiveLoss(7.0).sample_weight == 7.0
    assert DualContrastiveLoss(7.0).prototype_weight == paper.prototype_weight


def test_own_classification_loss() -> None:
    inputs = batch()
    out = DualContrastiveLoss(classification=AsymmetricLoss(2, 1, reduction="mean"))(**inputs)
    want = F.asymmetric_loss(inputs["logits"], inputs["labels"], gamma_neg=2, gamma_pos=1, reduction="mean")
    torch.testing.assert_close(out.classification, want)


def test_views_must_agree() -> None:
    inputs = batch()
    inputs["bank_embeddings"] = inputs["bank_embeddings"][:4]
    with pytest.raises(ValueError, match=r"bank_embeddings: expected embeddings' shape \(6, 5, 16\), got \(4, 5, 16\)"):
        DualContrastiveLoss()(**inputs)


@pytest.mark.parametrize("module", [SampleContrastiveLoss, PrototypeContrastiveLoss])
def test_learnable_temperature_learns_and_stays_in_bounds(module: type) -> None:
    inputs = batch()
    loss = module(learnable_temperature=(0.2, 0.1, 0.5))
    arguments = [inputs["embeddings"], inputs["labels"]]
    if module is PrototypeContrastiveLoss:
        arguments.insert(1, inputs["prototypes"])
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    torch.testing.assert_close(loss.temperature.detach(), torch.tensor(0.2))
    fixed = module(temperature=0.2)(*arguments)
    torch.testing.assert_close(loss(*arguments), fixed)

    loss(*arguments).backward()
    assert loss.log_temperature.grad.item() != 0
    with torch.no_grad():
        step = 1e-3
        values = []
        for sign in (1, -1):
            loss.log_temperature += sign * step
            values.append(loss(*arguments).item())
            loss.log_temperature -= sign * step
    torch.testing.assert_close(
        loss.log_temperature.grad, torch.tensor((values[0] - values[1]) / (2 * step)), rtol=2e-2, atol=1e-4
    )

    # A parameter beyond its bound gives the bound, no gradient outward, and a gradient back inward.
    for beyond, bound, outward in ((-9.0, 0.1, 1.0), (9.0, 0.5, -1.0)):
        loss.log_temperature.data.fill_(beyond)
        torch.testing.assert_close(loss.temperature.detach(), torch.tensor(bound))
        for direction, moves in ((outward, False), (-outward, True)):
            loss.log_temperature.grad = None
            (direction * loss.temperature).backward()
            assert (loss.log_temperature.grad.item() != 0) == moves


@pytest.mark.parametrize("bounds", [(0.2, 0.3, 0.5), (0.2, 0.0, 0.5), (0.2, 0.1, float("inf")), (0.6, 0.1, 0.5)])
def test_learnable_temperature_bounds_are_checked(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="learnable_temperature: expected"):
        SampleContrastiveLoss(learnable_temperature=bounds)


def test_modules_say_what_they_are() -> None:
    assert "temperature=0.2, formulation='paper'" in repr(DualContrastiveLoss())
    assert "learnable temperature in [0.1, 0.5]" in repr(SampleContrastiveLoss(learnable_temperature=(0.2, 0.1, 0.5)))
    assert "gamma_neg=4" in repr(AsymmetricLoss())


def test_class_weight_travels_with_the_module() -> None:
    loss = SampleContrastiveLoss(class_weight=torch.tensor([1.0, 0, 0, 0, 0]))
    inputs = batch()
    got = loss.double()(inputs["embeddings"].double(), inputs["labels"])
    want = F.sample_contrastive_loss(
        inputs["embeddings"].double(), inputs["labels"], class_weight=torch.tensor([1.0, 0, 0, 0, 0])
    )
    torch.testing.assert_close(got, want)
    assert "class_weight" in loss.state_dict()
