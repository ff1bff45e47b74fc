"""The C++ kernels of the image-level losses over many blocks: every instruction set, any number of threads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_mlc import KINDS, problem, run

from sadcl import functional as F
from sadcl.testing import make_features, make_labels


def assert_near(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], names: list[str]) -> None:
    for name, g, w in zip(names, got, want, strict=True):
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-12)
        assert error <= 2e-6, f"{name}: off by {error:.3g} of its norm"


@functools.cache
def large(kind: str, columns: str, tau: float) -> tuple[Any, Any, tuple[torch.Tensor, ...]]:
    """Rows and keys that no panel divides, more than a block of each: leaves, options, float64 loss and gradients."""
    leaves, options = problem(kind, columns, (223, 2, 40, 19, 331), "ignored", torch.float32)
    leaves["temperature"] = torch.tensor(tau)
    return leaves, options, run({name: leaf.double() for name, leaf in leaves.items()}, backend="torch", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks(kind: str, every_isa: str) -> None:
    """Scores beyond the fixed shift too."""
    for columns, tau in (("both", 0.1), ("keys", 0.02), ("batch", 0.02)):
        leaves, options, want = large(kind, columns, tau)
        assert_near(run(leaves, backend="cpp", **options), want, ["loss", *leaves])


@pytest.mark.parametrize("kind", ["any", "msc", "dense"])
def test_the_same_bits_every_time_and_near_for_any_threads(kind: str, threads: int) -> None:
    leaves, options, want = large(kind, "both", 0.1)
    first = run(leaves, backend="cpp", **options)
    assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, backend="cpp", **options), strict=True))
    assert_near(first, want, ["loss", *leaves])


@pytest.mark.parametrize("classes", [31, 32, 33, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_over_several_words(dtype: torch.dtype, classes: int) -> None:
    for kind in ("all", "jaccard", "simdis", "mulsupcon", "msc"):
        leaves, options = problem(kind, "both", (15, 1, classes, 9, 11), "random", dtype)
        options["labels"][:, -1], options["labels"][3, ::7], options["labels"][4, ::5] = 1, -1, 1
        options["labels"][5] = options["labels"][6]
        got = run(leaves, backend="cpp", **options)
        want = run({name: leaf.double() for name, leaf in leaves.items()}, backend="torch", **options)
        assert_near(got, want, ["loss", *leaves])


def test_keys_that_want_no_gradient_get_none() -> None:
    leaves, options = problem("any", "both", (23, 1, 5, 9, 31), "random", torch.float32)
    full = run(leaves, backend="cpp", **options)
    x = leaves["features"].clone().requires_grad_()
    given: dict[str, Any] = {**options, "keys": leaves["keys"], "temperature": leaves["temperature"]}
    F.multilabel_supcon_loss(x, given.pop("labels"), backend="cpp", **given).backward()
    assert torch.equal(x.grad, full[1])
    temperature = leaves["temperature"].clone().requires_grad_()
    given = {**options, "keys": leaves["keys"], "temperature": temperature}
    F.multilabel_supcon_loss(x.detach(), given.pop("labels"), backend="cpp", **given).backward()
    assert torch.equal(temperature.grad, full[2])


def test_memory_does_not_grow_with_the_square() -> None:
    """What is saved for the backward: a few numbers an anchor."""
    x = make_features(300, 16).requires_grad_()
    labels = make_labels(300, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        F.multilabel_supcon_loss(x, labels, weighting="any", backend="cpp")
    assert max(saved) <= 300 * 16
