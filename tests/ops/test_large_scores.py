"""SSCL and SupCon where scores are large: long features or small temperatures, held to what float32 products allow."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from tests.here import instruction_sets as extension_isas

EPS = torch.finfo(torch.float32).eps / 2


def unavoidable(z: Tensor, group: Tensor, temperature: float) -> Tensor:
    """How far float32 products may take each row of the gradient of the summed loss: ``[N]``, in float64.

    A product is off by a few ``EPS |z_i| |z_j|``, so a weight ``p = e^(s - lse)`` by ``2 p (1 - p)`` times that over
    the temperature: nothing where the softmax is certain, however large the scores. On top come the roundings of the
    sum ``sum_j w_ij z_j`` itself.
    """
    length = torch.linalg.vector_norm(z, dim=1)
    eye = torch.eye(z.shape[0], dtype=torch.bool)
    p = (z @ z.t() / temperature).masked_fill(eye, -torch.inf).softmax(dim=1)
    same = (group[:, None] == group) & ~eye
    k = same.sum(dim=1, keepdim=True)
    p = torch.where(k > 0, p, 0.0)
    pull = same / k.clamp(min=1)
    off = 4 * EPS * length[:, None] * length.max() / temperature
    moved = 2 * off * p * (1 - p)
    terms = p + pull
    return ((moved + moved.t()) @ length + 8 * EPS * (terms + terms.t()) @ length) / temperature


def assert_as_good(grad: Tensor, truth: Tensor, allowed: Tensor) -> None:
    """Rows ``[N, D]``, allowances ``[N]``."""
    error = torch.linalg.vector_norm(grad.double() - truth, dim=1)
    worst = (error / allowed).max()
    assert worst <= 1, f"an error of {worst:.3g} times what float32 products allow"


def implementations() -> list[object]:
    """The CPU extension by each instruction set, and plain torch."""
    isas = [pytest.param(("cpp", isa), id=isa) for isa in extension_isas()]
    return [*isas, pytest.param(("torch", ""), id="torch")]


@pytest.fixture(params=implementations())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, isa = request.param
    if not isa:
        yield name
        return
    extension = importlib.import_module("sadcl._C")
    before = extension.isa()
    extension.set_isa(isa)
    yield name
    extension.set_isa(before)


def supcon_grad(features: Tensor, labels: Tensor, backend: str) -> Tensor:
    x = features.clone().requires_grad_()
    loss = F.supcon_loss(x, labels, temperature=0.07, base_temperature=None, reduction="sum", backend=backend)
    return torch.autograd.grad(loss, x)[0].flatten(0, 1)


@functools.cache
def supcon_case(norm: float, images: int) -> tuple[Tensor, ...]:
    """Features, labels, the gradient in float64, what each of its rows may be off."""
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, 2, 64, generator=generator) * norm / 8
    labels = torch.randint(0, 10, (images,), generator=generator)
    allowed = unavoidable(x.flatten(0, 1).double(), labels.repeat_interleave(2), 0.07)
    return x, labels, supcon_grad(x.double(), labels, "reference"), allowed


# Rows whose scores are all kept, and rows that are worked on in blocks.
@pytest.mark.parametrize("images", [60, 300])
@pytest.mark.parametrize("norm", [5.0, 40.0, 160.0, 640.0])
def test_long_features(norm: float, images: int, backend: str) -> None:
    x, labels, truth, allowed = supcon_case(norm, images)
    assert_as_good(supcon_grad(x, labels, backend), truth, allowed)


@pytest.mark.parametrize("images", [60, 300])
def test_long_bfloat16_features(images: int, backend: str) -> None:
    """Forward and backward must not take their products on different ways."""
    x, labels = supcon_case(640.0, images)[:2]
    x = x.bfloat16()
    truth = supcon_grad(x.double(), labels, "reference")
    allowed = unavoidable(x.flatten(0, 1).double(), labels.repeat_interleave(2), 0.07)
    rounded = 2**-8 * torch.linalg.vector_norm(truth, dim=1)
    assert_as_good(supcon_grad(x, labels, backend), truth, allowed + rounded)


def sscl_grad(features: Tensor, labels: Tensor, temperature: float, formulation: str, backend: str) -> Tensor:
    """Of the active rows, by class."""
    x = features.clone().requires_grad_()
    options = {"temperature": temperature, "formulation": formulation, "reduction": "sum", "backend": backend}
    (grad,) = torch.autograd.grad(F.sample_contrastive_loss(x, labels, **options), x)
    label, image = labels.t().nonzero(as_tuple=True)
    return grad[image, :, label].flatten(0, 1)


@functools.cache
def sscl_case(temperature: float, formulation: str, images: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, 2, 10, 48, generator=generator)
    labels = (torch.rand(images, 10, generator=generator) < 0.5).float()
    label, image = labels.t().nonzero(as_tuple=True)
    rows = x[image, :, label].flatten(0, 1).double()
    length = torch.linalg.vector_norm(rows, dim=-1)
    allowed = 2 * unavoidable(rows / length[:, None], label.repeat_interleave(2), temperature) / length
    return x, labels, sscl_grad(x.double(), labels, temperature, formulation, "reference"), allowed


@pytest.mark.parametrize("images", [20, 60])
@pytest.mark.parametrize("formulation", ["paper", "released"])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_small_temperatures(temperature: float, formulation: str, images: int, backend: str) -> None:
    x, labels, truth, allowed = sscl_case(temperature, formulation, images)
    assert_as_good(sscl_grad(x, labels, temperature, formulation, backend), truth, allowed)
