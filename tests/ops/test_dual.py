"""The dual loss: its parts, weights and learnable temperatures."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sadcl import AsymmetricLoss, DualContrastiveLoss, PrototypeContrastiveLoss, SampleContrastiveLoss
from sadcl import functional as F
from sadcl.losses import DEFAULT_WEIGHTS
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads


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


def apart(x: Tensor, bank: Tensor | None, p: Tensor, labels: Tensor, formulation: str) -> tuple[Tensor, Tensor]:
    """What the fused op replaces: two ops on stacked views, whose gradients autograd adds."""
    views = x[:, None] if bank is None else torch.stack([x, bank], dim=1)
    return (
        F.sample_contrastive_loss(views, labels, formulation=formulation),
        F.prototype_contrastive_loss(x, p, labels, formulation=formulation),
    )


def mixed(losses: tuple[Tensor, Tensor]) -> Tensor:
    return 3 * losses[0] - 0.7 * losses[1]


@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fused_is_the_two_ops(dtype: torch.dtype, pattern: str, formulation: str) -> None:
    labels = make_labels(7, 5, pattern)
    x, bank, p = (make_features(*n, dtype=dtype, seed=i) for i, n in enumerate([(7, 5, 33), (7, 5, 33), (5, 33)]))
    for second in (bank, None):
        leaves = [x, p] if second is None else [x, p, second]
        with poisoned_allocations():
            got = value_and_grads(
                lambda x, p, b=None: mixed(F.dual_contrastive_loss(x, b, p, labels, formulation=formulation)), *leaves
            )
        want = value_and_grads(lambda x, p, b=None: mixed(apart(x, b, p, labels, formulation)), *leaves)
        for a, b in zip(got, want, strict=True):
            # The same kernels on the same numbers; only the sum of the two gradients is rounded in another place.
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps * b.abs().max().item())


def test_fused_reads_any_layout() -> None:
    labels, p = make_labels(7, 5, "ignored"), make_features(5, 33, seed=9)
    x, bank = make_features(7, 5, 33, seed=1), make_features(7, 5, 33, seed=2)
    want = value_and_grads(lambda x, b: mixed(F.dual_contrastive_loss(x, b, p, labels)), x, bank)
    for (name, a), (other, b) in itertools.product(layouts(x), layouts(bank)):  # equal strides: in place
        for first, second in ((a, b), (a.transpose(1, 2).contiguous().transpose(1, 2), b)):
            got = value_and_grads(lambda x, b: mixed(F.dual_contrastive_loss(x, b, p, labels)), first, second)
            torch.testing.assert_close(got, want, msg=f"{name}, {other}")
    packed = torch.stack([bank, x])  # the second view in front of the first: a negative distance between them
    got = value_and_grads(lambda v: mixed(F.dual_contrastive_loss(v[1], v[0], p, labels)), packed)
    torch.testing.assert_close((got[1][1], got[1][0]), want[1:])


def test_fused_partial_gradients() -> None:
    labels = make_labels(6, 5)
    inputs = make_features(6, 5, 16), make_features(6, 5, 16, seed=2), make_features(5, 16, seed=4), torch.tensor(0.1)

    def run(x: Tensor, bank: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return mixed(F.dual_contrastive_loss(x, bank, p, labels, sample_temperature=t, prototype_temperature=t))

    full = value_and_grads(run, *inputs)[1:]
    for wanted in itertools.product([False, True], repeat=4):
        leaves = [v.clone().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        loss = run(*leaves)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            if asked:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=0)
            else:
                assert leaf.grad is None


def test_fused_same_bits_every_run() -> None:
    labels, p = make_labels(32, 20), make_features(20, 64, seed=9)
    inputs = make_features(32, 20, 64), make_features(32, 20, 64, seed=2)
    runs = [value_and_grads(lambda x, b: mixed(F.dual_contrastive_loss(x, b, p, labels)), *inputs) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


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
    with pytest.raises(TypeError, match=r"bank_embeddings: expected embeddings' dtype torch.float32"):
        DualContrastiveLoss()(**batch() | {"bank_embeddings": torch.zeros(6, 5, 16, dtype=torch.float64)})
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
