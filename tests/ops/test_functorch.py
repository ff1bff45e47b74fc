"""Under torch.func, and in forward mode: what is supported gives ``.backward()``'s numbers, the rest says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import backends_here
from torch import Tensor

from sadcl import functional as F
from sadcl.losses import SampleContrastiveLoss
from sadcl.testing import make_features, make_labels, value_and_grads

BACKENDS = backends_here("sscl")
LABELS = make_labels(6, 5, "ignored")
GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])
PROTOTYPES = make_features(5, 8, seed=4, dtype=torch.float64)


def losses(backend: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, of features ``[6, 5, 8]``."""
    return {
        "sscl": lambda x: F.sample_contrastive_loss(x, LABELS, backend=backend),
        "pscl": lambda x: F.prototype_contrastive_loss(x, PROTOTYPES, LABELS, backend=backend),
        "dual": lambda x: sum(F.dual_contrastive_loss(x, x.flip(0), PROTOTYPES, LABELS, backend=backend)),
        "asl": lambda x: F.asymmetric_loss(x[..., 0], LABELS, backend=backend),
        "supcon": lambda x: F.supcon_loss(x, GROUPS, backend=backend),
        "label_attention": lambda x: attention(x, backend).square().sum(),
        "group_classifier": lambda x: classifier(x, backend).square().sum(),
    }


def attention(x: Tensor, backend: str) -> Tensor:
    weights = [torch.linspace(-1, 1, 8 * n, dtype=x.dtype).view(n, 8) for n in (24, 8)]
    query = torch.linspace(0, 1, 16, dtype=x.dtype).view(2, 8)
    return F.label_attention(query, x, weights[0], None, weights[1], None, 2, backend=backend)[0]


def classifier(x: Tensor, backend: str) -> Tensor:
    from sadcl.functional.group_classifier import group_classifier

    return group_classifier(x, PROTOTYPES, torch.zeros(5, dtype=x.dtype), backend)


NAMES = sorted(losses("torch"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reverse_mode_gives_the_numbers_of_backward(name: str, backend: str) -> None:
    run = losses(backend)[name]
    x = make_features(6, 5, 8, dtype=torch.float64)
    value, want = value_and_grads(run, x)
    torch.testing.assert_close(torch.func.grad(run)(x), want)
    got, pull = torch.func.vjp(run, x)
    torch.testing.assert_close((got, pull(torch.ones_like(got))[0]), (value, want))
    torch.testing.assert_close(torch.func.jacrev(run)(x), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name: str, backend: str) -> None:
    run = losses(backend)[name]
    many = torch.stack([make_features(6, 5, 8, dtype=torch.float64, seed=seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(torch.func.vmap(run)(many), torch.stack([run(x) for x in many]))
    grads = torch.func.vmap(torch.func.grad(run), in_dims=1)(many.movedim(0, 1).contiguous())
    torch.testing.assert_close(grads, torch.stack([value_and_grads(run, x)[1] for x in many]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_with_grad(backend: str) -> None:
    module = SampleContrastiveLoss(learnable_temperature=(0.2, 0.01, 1.0), backend=backend).double()
    x = make_features(6, 5, 8, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x, LABELS)))(parameters)
    module(x, LABELS).backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sscl", "pscl", "dual", "asl", "supcon"])
def test_forward_mode_says_what_to_do(name: str, backend: str) -> None:
    run, x = losses(backend)[name], make_features(6, 5, 8, dtype=torch.float64)
    said = "forward-mode derivatives .* are not implemented; use reverse mode"
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        run(forward_ad.make_dual(x, torch.ones_like(x)))
