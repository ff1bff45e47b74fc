"""Golden numbers of the losses, in float32, on every backend that runs here (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sadcl import compat
from sadcl import functional as F
from tests.here import backends_here

GOLDEN = Path(__file__).parents[1] / "golden"


def files(prefix: str) -> list[object]:
    found = sorted(GOLDEN.glob(f"{prefix}_*.npz"))
    assert found, f"no {prefix} files in {GOLDEN}"
    return [pytest.param(path, id=path.stem) for path in found]


def assert_golden(got: torch.Tensor, want: np.ndarray, name: str) -> None:
    error = np.linalg.norm(got.detach().double().numpy() - want)
    assert error <= 1e-5 * max(np.linalg.norm(want), 0.3), f"{name}: off by {error:.3g}"


@pytest.mark.parametrize("backend", backends_here("sscl", "reference"))
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("path", files("sscl"))
def test_sscl(path: Path, formulation: str, backend: str) -> None:
    golden = np.load(path)
    features = torch.tensor(golden["features"], requires_grad=True)
    assert features.dtype == torch.float32
    loss = F.sample_contrastive_loss(
        features,
        torch.tensor(golden["labels"]),
        temperature=float(golden["temperature"]),
        base_temperature=float(golden["base_temperature"]),
        formulation=formulation,
        backend=backend,
    )
    loss.backward()
    assert_golden(loss, golden[f"{formulation}_loss"], "loss")
    assert_golden(features.grad, golden[f"{formulation}_grad"], "gradient")


@pytest.mark.parametrize("backend", backends_here("pscl", "reference"))
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
@pytest.mark.parametrize("path", files("pscl"))
def test_pscl(path: Path, formulation: str, backend: str) -> None:
    golden = np.load(path)
    features = torch.tensor(golden["features"], requires_grad=True)
    prototypes = torch.tensor(golden["prototypes"], requires_grad=True)
    loss = F.prototype_contrastive_loss(
        features,
        prototypes,
        torch.tensor(golden["labels"]),
        temperature=float(golden["temperature"]),
        formulation=formulation,
        backend=backend,
    )
    loss.backward()
    if f"{formulation}_loss" not in golden:  # the released code crashes without a positive; ours is defined
        assert formulation == "released" and "released_error" in golden
        assert loss == 0 and (features.grad == 0).all() and (prototypes.grad == 0).all()
        return
    assert_golden(loss, golden[f"{formulation}_loss"], "loss")
    assert_golden(features.grad, golden[f"{formulation}_grad_features"], "gradient of features")
    assert_golden(prototypes.grad, golden[f"{formulation}_grad_prototypes"], "gradient of prototypes")


@pytest.mark.parametrize("backend", backends_here("asl", "reference"))
@pytest.mark.parametrize("path", files("asl"))
def test_asl(path: Path, backend: str) -> None:
    golden = np.load(path)
    logits = torch.tensor(golden["logits"], requires_grad=True)
    loss = F.asymmetric_loss(
        logits,
        torch.tensor(golden["labels"]),
        gamma_neg=float(golden["gamma_neg"]),
        gamma_pos=float(golden["gamma_pos"]),
        clip=float(golden["clip"]),
        eps=float(golden["eps"]),
        detach_focal_weight=bool(golden["detach_focal_weight"]),
        reduction="released",
        backend=backend,
    )
    loss.backward()
    assert_golden(loss, golden["released_loss"], "loss")
    assert_golden(logits.grad, golden["released_grad"], "gradient")


@pytest.mark.parametrize("backend", backends_here("mlc", "reference"))
@pytest.mark.parametrize("path", files("mlc"))
def test_mlc(path: Path, backend: str) -> None:
    golden = np.load(path)
    vectors = [name for name in ("features", "keys", "prototypes") if name in golden]
    leaves = {name: torch.tensor(golden[name], requires_grad=True) for name in vectors}
    temperature = torch.tensor(float(golden["temperature"]), dtype=torch.float64, requires_grad=True)
    options = {name: golden[name].item() for name in ("threshold", "alpha", "beta", "per_image") if name in golden}
    loss = F.multilabel_supcon_loss(
        labels=torch.tensor(golden["labels"]),
        key_labels=torch.tensor(golden["key_labels"]) if "keys" in golden else None,
        weighting=str(golden["kind"]),
        temperature=temperature,
        include_batch=bool(golden["include_batch"]) if "include_batch" in golden else "keys" not in golden,
        backend=backend,
        **leaves,
        **options,
    )
    loss.backward()
    assert loss.dtype == torch.float32
    assert_golden(loss, golden["loss"], "loss")
    for name, leaf in leaves.items():
        assert_golden(leaf.grad, golden[f"grad_{name}"], name)
    if "grad_temperature" in golden:
        assert_golden(temperature.grad, golden["grad_temperature"], "temperature")


def test_released_names_are_the_same_numbers() -> None:
    golden = np.load(GOLDEN / "sscl_002.npz")
    features = torch.tensor(golden["features"], requires_grad=True)
    sscl = compat.MultiSupConLoss(float(golden["temperature"]), "all", float(golden["base_temperature"]))
    loss = sscl(features, torch.tensor(golden["labels"]))
    loss.backward()
    assert_golden(loss, golden["released_loss"], "MultiSupConLoss")
    assert_golden(features.grad, golden["released_grad"], "MultiSupConLoss, gradient")

    golden = np.load(GOLDEN / "pscl_003.npz")
    pscl = compat.Semantic2PrototypeConLoss(temperature=float(golden["temperature"]))
    loss = pscl(*(torch.tensor(golden[name]) for name in ("features", "prototypes", "labels")))
    assert_golden(loss, golden["released_loss"], "Semantic2PrototypeConLoss")

    golden = np.load(GOLDEN / "asl_002.npz")
    asl = compat.AsymmetricLossOptimized(2, 1, 0.05, 1e-5, disable_torch_grad_focal_loss=True)
    loss = asl(torch.tensor(golden["logits"]), torch.tensor(golden["labels"]))
    assert_golden(loss, golden["released_loss"], "AsymmetricLossOptimized")


def test_released_names_refuse_what_the_released_code_never_did() -> None:
    features, labels = torch.randn(2, 2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="labels"):
        compat.MultiSupConLoss()(features)
    with pytest.raises(ValueError, match="mask=None"):
        compat.MultiSupConLoss()(features, labels, mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="contrast_mode"):
        compat.MultiSupConLoss(contrast_mode="one")
    with pytest.raises(ValueError, match="metric"):
        compat.Semantic2PrototypeConLoss(metric="l2")
