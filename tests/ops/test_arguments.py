"""Bad input gets an error that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import CALLS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sadcl
from sadcl import functional as F

WEIGHTS = {"class_weight", "sample_weight"}
X, P, Y = torch.randn(4, 2, 3, 8), torch.randn(3, 8), torch.ones(4, 3)


def sscl(features: object = X, labels: object = Y, **options: object) -> Tensor:
    return F.sample_contrastive_loss(features, labels, **options)


def pscl(features: object = X[:, 0], prototypes: object = P, labels: object = Y, **options: object) -> Tensor:
    return F.prototype_contrastive_loss(features, prototypes, labels, **options)


def asl(logits: object = X[:, 0, :, 0], labels: object = Y, **options: object) -> Tensor:
    return F.asymmetric_loss(logits, labels, **options)


VALUE_ERRORS: list[tuple[Callable[..., Tensor], dict[str, object], str]] = [
    (sscl, {"features": X[0, 0]}, r"features: expected shape \[B, V, C, D\] or \[B, C, D\], got \(3, 8\)"),
    (sscl, {"features": X[:0], "labels": Y[:0]}, r"features: expected no empty dimension, got shape \(0, 2, 3, 8\)"),
    (sscl, {"features": X[..., :0]}, "features: expected no empty dimension"),
    (sscl, {"labels": Y[0]}, r"labels: expected shape \[B, C\], got \(3,\)"),
    (sscl, {"labels": Y[:3]}, r"labels: expected B=4 \(from features\) in dimension 0, got shape \(3, 3\)"),
    (sscl, {"labels": Y[:, :2]}, r"labels: expected C=3 \(from features\) in dimension 1"),
    (sscl, {"labels": 0.5 * Y}, r"labels: expected 0, 1 or -1 \(ignored\), got values 0.5"),
    (sscl, {"labels": Y.to("meta")}, "labels is on meta but features is on cpu"),
    (sscl, {"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
    (sscl, {"temperature": -1}, "temperature: expected a finite number > 0, got -1"),
    (sscl, {"temperature": float("nan")}, "temperature: expected a finite number > 0, got nan"),
    (
        sscl,
        {"temperature": torch.ones(2)},
        r"temperature: expected a number or a tensor of one element, got shape \(2,\)",
    ),
    (sscl, {"formulation": "original"}, "formulation: expected one of paper, released, got 'original'"),
    (sscl, {"reduction": "average"}, "reduction: expected one of mean, sum, none, got 'average'"),
    (sscl, {"backend": "fast"}, "backend: expected one of cpp, triton, cuda, torch, reference, got 'fast'"),
    (sscl, {"class_weight": torch.ones(4)}, r"class_weight: expected C=3"),
    (sscl, {"sample_weight": torch.ones(3)}, r"sample_weight: expected B=4"),
    (sscl, {"active": F.compact_labels(Y[:2])}, r"active: expected it from labels \(4, 3\), got \(2, 3\)"),
    (pscl, {"features": X}, r"features: expected shape \[B, C, D\], got \(4, 2, 3, 8\)"),
    (pscl, {"prototypes": P[:2]}, r"prototypes: expected C=3 \(from features\)"),
    (pscl, {"prototypes": P[:, :5]}, r"prototypes: expected D=8 \(from features\)"),
    (pscl, {"prototypes": P.expand(2, 3, 8)}, r"prototypes: expected leading size=1"),
    (pscl, {"prototypes": P.to("meta")}, "prototypes is on meta but features is on cpu"),
    (pscl, {"labels": Y[:, :2]}, "labels: expected C=3"),
    (pscl, {"temperature": 0}, "temperature: expected a finite number > 0"),
    (asl, {"logits": X}, r"logits: expected shape \[B, C\], got \(4, 2, 3, 8\)"),
    (asl, {"labels": Y[:2]}, r"labels: expected B=4 \(from logits\)"),
    (asl, {"labels": 2 * Y}, r"labels: expected values in \[0, 1\] or -1 \(ignored\), got 2"),
]


@pytest.mark.parametrize("function, arguments, message", VALUE_ERRORS)
def test_value_errors(function: Callable[..., Tensor], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (sscl, {"features": X.numpy()}, "features: expected a torch.Tensor .*got ndarray"),
        (sscl, {"features": X.long()}, "features: expected a floating point dtype, got torch.int64"),
        (sscl, {"labels": [[1, 0, 1]]}, "labels: expected a torch.Tensor"),
        (sscl, {"temperature": "warm"}, "temperature: expected a number > 0, got str"),
        (sscl, {"temperature": True}, "temperature: expected a number > 0, got bool"),
        (sscl, {"active": (1, 2)}, "active: expected the result of compact_labels, got tuple"),
        (pscl, {"prototypes": P.double()}, "prototypes: expected features' dtype torch.float32, got torch.float64"),
        (asl, {"logits": Y.long()}, "logits: expected a floating point dtype"),
        (sscl, {"class_weight": [1, 2, 3]}, "class_weight: expected a torch.Tensor"),
    ],
)
def test_type_errors(function: Callable[..., Tensor], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if WEIGHTS & call.axes.keys()])
def test_a_weight_is_a_finite_number_of_at_least_0(name: str) -> None:
    """On every path and backend, before anything is computed; not under a compiler, which has no values to read."""
    call = CALLS[name]
    for weight in WEIGHTS & call.axes.keys():
        for value, text in ((-0.5, "-0.5"), (float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")):
            tensors = call.make()
            tensors[weight][1] = value
            for backend in (None, "torch", "reference"):
                with pytest.raises(ValueError, match=f"{weight}: expected finite numbers >= 0, got {text}$"):
                    call.run(backend, **tensors)
        tensors = call.make()
        tensors[weight] = torch.tensor([True, False]).repeat(3)[: len(tensors[weight])]
        assert call.run("torch", **tensors).isfinite()
    tensors = call.make()
    if name == "asl":
        torch.compile(call.run, fullgraph=True, backend="eager")("torch", **tensors)
    with FakeTensorMode() as mode:
        assert call.run("torch", **{key: mode.from_tensor(tensor) for key, tensor in tensors.items()}).shape == ()


def test_every_call_of_the_table_is_otherwise_good() -> None:
    assert all(function().isfinite() for function in (sscl, pscl, asl))


@pytest.mark.skipif(sadcl.backends()["triton"].available, reason="triton runs here")
def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (sscl, pscl, asl):
        with pytest.raises(RuntimeError, match="backend='triton'"):
            function(backend="triton")
    monkeypatch.setenv("SADCL_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="SADCL_BACKEND='triton'"):
        sscl()
    assert sscl(backend="torch").isfinite()
    monkeypatch.setenv("SADCL_BACKEND", "fast")
    with pytest.raises(ValueError, match="SADCL_BACKEND: expected one of cpp, triton, cuda, torch, .*, got 'fast'"):
        sscl()


def test_sadcl_backend_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    features = X.clone().requires_grad_()
    monkeypatch.setenv("SADCL_BACKEND", "reference")
    # Only the oracle can be differentiated twice.
    (grad,) = torch.autograd.grad(sscl(features), features, create_graph=True)
    grad.square().sum().backward()


def test_backends_say_what_they_are_or_why_not() -> None:
    found = sadcl.backends()
    assert list(found) == ["cpp", "triton", "cuda", "torch", "reference"]
    assert found["torch"].available and found["reference"].available
    for info in found.values():
        assert bool(info.reason) != info.available
        assert bool(info.detail) == info.available
