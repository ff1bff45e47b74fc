"""Under torch.func, and in forward mode: what is supported gives ``.backward()``'s numbers, the rest says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from calls import CALLS, cases
from torch import Tensor

import sadcl
from sadcl import functional as F
from sadcl.functional.linear import SWITCH
from sadcl.losses import SampleContrastiveLoss
from sadcl.testing import make_features, make_labels, value_and_grads
from tests.here import backends_here

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


# -- over every public function and tensor of tests/ops/calls.py --


def split(name: str, backend: str | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The function of the tensors that have a derivative, and these in float64."""
    call = CALLS[name]
    tensors = call.make(dtype=torch.float64)
    fixed = {key: x for key, x in tensors.items() if key not in call.derived}
    return (
        lambda *values: call.run(backend, **fixed, **dict(zip(call.derived, values, strict=True))),
        tuple(tensors[key] for key in call.derived),
    )


@pytest.mark.parametrize("name, backend", cases())
def test_grad_of_every_tensor(name: str, backend: str) -> None:
    run, values = split(name, backend)
    got = torch.func.grad(run, argnums=tuple(range(len(values))))(*values)
    for ours, want in zip(got, value_and_grads(run, *values)[1:], strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("name, backend", cases())
def test_vmap_over_every_tensor_and_its_gradients(name: str, backend: str) -> None:
    """Stacked parameters of an ensemble, features, weights and temperatures, each alone and all at once."""
    run, values = split(name, backend)
    factors = torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64)  # soft labels stay in [0, 1]
    each = [[i] for i in range(len(values))] if len(values) > 1 else []
    for mapped in (*each[:3], list(range(len(values)))):
        stacked = [torch.stack([f * x for f in factors]) if i in mapped else x for i, x in enumerate(values)]
        in_dims = tuple(0 if i in mapped else None for i in range(len(values)))
        grad = torch.func.grad_and_value(run, argnums=tuple(mapped))
        grads, losses = torch.func.vmap(grad, in_dims=in_dims)(*stacked)
        for at in range(len(factors)):
            alone = [x[at] if i in mapped else x for i, x in enumerate(stacked)]
            want = value_and_grads(run, *alone)
            torch.testing.assert_close(losses[at], want[0])
            for i, ours in zip(mapped, grads, strict=True):
                torch.testing.assert_close(ours[at], want[1 + i])


@pytest.mark.parametrize("name, backend", cases(names=("sscl", "sscl-released", "pscl", "dual", "asl", "supcon")))
def test_vmap_over_labels(name: str, backend: str) -> None:
    """Labels of each entry too, of which every entry has its own number of positives."""
    call = CALLS[name]
    tensors = call.make(dtype=torch.float64)
    field = "groups" if "groups" in tensors else "labels"
    many = torch.stack([tensors[field], tensors[field].flip(0), tensors[field].roll(1, -1)])
    others = {key: x for key, x in tensors.items() if key != field}
    got = torch.func.vmap(lambda labels: call.run(backend, **others, **{field: labels}))(many)
    want = torch.stack([call.run(backend, **others, **{field: labels}) for labels in many])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name, backend", cases(names=[name for name in CALLS if CALLS[name].function]))
def test_forward_mode_is_right_or_refused(name: str, backend: str) -> None:
    """Refused by an error that names what has it, also without grad mode; attention, classifier and linear have it."""
    run, values = split(name, None if CALLS[name].function in ("label_attention", "group_classifier") else backend)
    tangents = tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in values)
    if CALLS[name].function in ("label_attention", "group_classifier", "linear"):
        want = sum((g * t).sum() for g, t in zip(value_and_grads(run, *values)[1:], tangents, strict=True))
        torch.testing.assert_close(torch.func.jvp(run, values, tangents)[1], want)
        with torch.no_grad(), forward_ad.dual_level():
            value = run(*map(forward_ad.make_dual, values, tangents))
            torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, want)
        return
    said = r"forward-mode derivatives .* use reverse mode \(grad, vjp, jacrev\), or backend='reference'"
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(run, values, tangents)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        run(*map(forward_ad.make_dual, values, tangents))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        run(*map(forward_ad.make_dual, values, tangents))
    oracle, values = split(name, "reference")
    want = sum((g * t).sum() for g, t in zip(value_and_grads(oracle, *values)[1:], tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(oracle, values, tangents)[1], want)


def curvature(run: Callable[..., Tensor], values: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the squared length of the gradient."""
    leaves = [x.detach().requires_grad_() for x in values]
    grads = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    return list(torch.autograd.grad(penalty, leaves, materialize_grads=True))


@pytest.mark.parametrize("name, backend", cases(names=[name for name in CALLS if CALLS[name].function]))
def test_second_derivatives_are_right_or_refused(name: str, backend: str) -> None:
    run, values = split(name, backend)
    if CALLS[name].function in ("group_classifier", "linear"):
        direct = lambda *x: torch.func.grad_and_value(run, argnums=tuple(range(len(values))))(*x)[0]  # noqa: E731
        nested = torch.func.grad(
            lambda *x: sum(g.square().sum() for g in direct(*x)), argnums=tuple(range(len(values)))
        )(*values)
        for ours, theirs in zip(curvature(run, values), nested, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert torch.autograd.gradgradcheck(run, [x.detach().requires_grad_() for x in values], fast_mode=True)
        return
    if backend == "torch" and name in ("attention-folded", "attention-weights"):
        assert torch.autograd.gradgradcheck(run, [x.detach().requires_grad_() for x in values], fast_mode=True)
        return
    said = "second derivatives are not implemented|derivative for aten::_scaled_dot_product_flash"
    with pytest.raises(RuntimeError, match=said):
        curvature(run, values)
    if backend != "torch":
        return
    # What the error advises. The released gradients are not their values' (maxima are constants in them).
    oracle, values = split(name, "reference")
    assert all(x.isfinite().all() for x in curvature(oracle, values))
    if "released" not in name and name != "asl-mean":
        assert torch.autograd.gradgradcheck(oracle, [x.detach().requires_grad_() for x in values], fast_mode=True)


@pytest.mark.parametrize("product", ["cpp", "torch"])
def test_a_linear_layer_is_the_same_function_on_every_processor(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever product a processor gets: every transform has it, and gives torch's numbers."""
    if not sadcl.backends()["cpp"].available:
        pytest.skip(sadcl.backends()["cpp"].reason)
    monkeypatch.setenv(SWITCH, product)
    run, values = split("linear", None)
    plain = lambda *x: torch.nn.functional.linear(*x).square().sum()  # noqa: E731
    every = tuple(range(len(values)))
    for transform in (
        lambda f: torch.func.grad(f, argnums=every)(*values),
        lambda f: torch.func.hessian(f)(*values),
        lambda f: torch.func.jacrev(torch.func.jacrev(f))(*values),
        lambda f: torch.func.jvp(f, values, values),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None, None))(*values),
        lambda f: curvature(f, values),
    ):
        torch.testing.assert_close(transform(run), transform(plain))
