"""The op layer: opcheck, gradcheck, torch.compile, autocast, partial gradients, second derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import backends_here
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sadcl import functional as F
from sadcl.ops._library import call
from sadcl.testing import make_features, make_labels, value_and_grads

NAMES = ("sscl", "pscl", "asl", "dual")
BACKENDS = backends_here("sscl")
OPS_AND_BACKENDS = [pytest.param(name, *p.values, marks=p.marks) for name in NAMES for p in backends_here(name)]
ops = torch.ops.sadcl


def sscl_arguments(backend: str, dtype: torch.dtype, grad: bool) -> tuple[object, ...]:
    x = make_features(4, 2, 3, 5, dtype=dtype).requires_grad_(grad)
    active = F.compact_labels(make_labels(4, 3, "ignored"), backend if backend == "cpp" else "torch")
    tau = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=grad)
    return x, active.pairs, active.class_ptr, tau, True, False, 24 * 24 * grad, backend


def pscl_arguments(backend: str, dtype: torch.dtype, grad: bool) -> tuple[object, ...]:
    x = make_features(4, 3, 5, dtype=dtype).requires_grad_(grad)
    p = make_features(3, 5, dtype=dtype, seed=9).requires_grad_(grad)
    tau = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=grad)
    return x, p, make_labels(4, 3, "ignored").to(torch.int8), tau, False, backend


def asl_arguments(backend: str, dtype: torch.dtype, grad: bool) -> tuple[object, ...]:
    logits = torch.randn(4, 3).to(dtype).requires_grad_(grad)
    return logits, make_labels(4, 3), torch.rand(3), 4.0, 1.0, 0.05, 1e-8, False, True, True, backend


def dual_arguments(backend: str, dtype: torch.dtype, grad: bool) -> tuple[object, ...]:
    x, pairs, class_ptr, tau, *_ = sscl_arguments(backend, dtype, grad)
    _, prototypes, target, prototype_tau, *_ = pscl_arguments(backend, dtype, grad)
    first, second = (x.detach()[:, v].clone().requires_grad_(grad) for v in (0, 1))
    return first, second, prototypes, pairs, class_ptr, target, tau, prototype_tau, False, 24 * 24 * grad, backend


ARGUMENTS = {"sscl": sscl_arguments, "pscl": pscl_arguments, "asl": asl_arguments, "dual": dual_arguments}


@pytest.mark.parametrize("name, backend", OPS_AND_BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype, grad: bool, backend: str) -> None:
    opcheck(getattr(ops, name).default, ARGUMENTS[name](backend, dtype, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_compact(backend: str) -> None:
    for labels in (make_labels(5, 4, "ignored"), make_labels(3, 2).t().bool()):
        opcheck(ops.compact.default, (labels, labels.numel(), backend))
        opcheck(ops.compact.default, (labels, 19, backend))


@pytest.mark.parametrize("name, backend", OPS_AND_BACKENDS)
@pytest.mark.parametrize("run", [lambda name, *args: getattr(ops, name)(*args), call], ids=["dispatched", "eager"])
def test_gradcheck(name: str, backend: str, run: Callable[..., tuple[Tensor, ...]]) -> None:
    arguments = ARGUMENTS[name](backend, torch.float64, True)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def value(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = iter(values)
        filled = [next(given) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
        outputs = run(name, *filled)
        return (outputs[0], outputs[4]) if name == "dual" else outputs[0]

    assert torch.autograd.gradcheck(value, leaves)


class Seen(TorchDispatchMode):
    """Writes down what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dispatcher_is_passed_by_unless_somebody_watches(backend: str) -> None:
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    for run in losses(backend).values():
        want = value_and_grads(lambda x, run=run: run(x, p), x)
        with Seen() as seen:
            got = value_and_grads(lambda x, run=run: run(x, p), x)
        assert any(name.startswith("sadcl::") and name.endswith("_backward") for name in seen.names), seen.names
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def losses(backend: str | None) -> dict[str, Callable[..., Tensor]]:
    labels = make_labels(6, 5, "ignored")
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    return {
        "sscl": lambda x, p: F.sample_contrastive_loss(x, labels, backend=backend),
        "sscl_rows": lambda x, p: (
            F.sample_contrastive_loss(x, labels, reduction="none", backend=backend).square().sum()
        ),
        "sscl_released": lambda x, p: F.sample_contrastive_loss(
            x, labels, formulation="released", base_temperature=0.1, backend=backend
        ),
        "pscl": lambda x, p: F.prototype_contrastive_loss(x, p, labels, backend=backend),
        "pscl_weighted": lambda x, p: F.prototype_contrastive_loss(
            x, p, labels, sample_weight=torch.arange(6.0), backend=backend
        ),
        "asl": lambda x, p: F.asymmetric_loss(x[..., 0], labels, backend=backend),
        "asl_mean": lambda x, p: F.asymmetric_loss(x[..., 1], labels, reduction="mean", backend=backend),
        "supcon": lambda x, p: F.supcon_loss(x, groups, backend=backend),
        "dual": lambda x, p: sum(F.dual_contrastive_loss(x, x.flip(0), p.to(x.dtype), labels, backend=backend)),
    }


@pytest.mark.parametrize("name", list(losses(None)))
def test_compiled_values_and_gradients(name: str) -> None:
    run = losses(None)[name]
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = make_features(6, 5, 16, seed=seed)
        used = (x, p) if name.startswith("pscl") else (x,)
        padded = (lambda f: f) if len(used) == 2 else (lambda f: lambda x: f(x, p))
        got, want = value_and_grads(padded(compiled), *used), value_and_grads(padded(run), *used)
        torch.testing.assert_close(got, want)


def test_compiled_by_inductor() -> None:
    labels = make_labels(6, 5)

    def total(x: Tensor) -> Tensor:
        return F.sample_contrastive_loss(x * 2.0, labels) + F.asymmetric_loss(x[:, 0, :, 0], labels, reduction="mean")

    x = make_features(6, 2, 5, 16)
    torch._dynamo.reset()
    got = value_and_grads(torch.compile(total, fullgraph=True), x)
    torch.testing.assert_close(got, value_and_grads(total, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_inside(
    dtype: torch.dtype, autocast_dtype: torch.dtype, enabled: bool, backend: str
) -> None:
    x, p = make_features(6, 5, 16, dtype=dtype), make_features(5, 16, seed=4, dtype=dtype)
    for name, run in losses(backend).items():
        want = run(x, p)
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=enabled):
            got = run(x, p)
            if dtype == autocast_dtype and enabled and name.startswith("pscl"):
                run(x, p.float())  # a projected feature is low precision, a parameter is not
        assert got.dtype == torch.float32 and torch.equal(got, want), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients(backend: str) -> None:
    x, p, labels = make_features(6, 5, 16), make_features(5, 16, seed=4), make_labels(6, 5)
    full = value_and_grads(
        lambda x, p, t: F.prototype_contrastive_loss(x, p, labels, temperature=t, backend=backend),
        x, p, torch.tensor(0.1),
    )[1:]  # fmt: skip
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [v.clone().requires_grad_(w) for v, w in zip((x, p, torch.tensor(0.1)), wanted, strict=True)]
        loss = F.prototype_contrastive_loss(*leaves[:2], labels, temperature=leaves[2], backend=backend)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None
    features = x[:, None].contiguous()
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = F.sample_contrastive_loss(features, labels, temperature=temperature, backend=backend)
    loss.backward()
    assert temperature.grad is not None and temperature.grad != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(losses(None)))
def test_second_derivative_is_a_clear_error(name: str, backend: str) -> None:
    x, p = make_features(6, 5, 16).requires_grad_(), make_features(5, 16, seed=4)
    (grad,) = torch.autograd.grad(losses(backend)[name](x, p), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.square().sum().backward()
    (grad,) = torch.autograd.grad(losses("reference")[name](x, p), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_upstream_are_left_alone(backend: str) -> None:
    x, p = make_features(6, 5, 16), make_features(5, 16, seed=4)
    for name, run in losses(backend).items():
        before = x.clone(), p.clone()
        value_and_grads(lambda x, run=run: run(x, p), x)
        assert torch.equal(x, before[0]) and torch.equal(p, before[1]), name
