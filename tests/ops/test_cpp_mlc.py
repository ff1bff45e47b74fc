"""The C++ kernels of the image-level losses over many blocks: every instruction set, any number of threads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_mlc import KINDS, problem, run

from sadcl import functional as F
from sadcl.ops import mlc
from sadcl.ops._native import extension
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


@pytest.mark.parametrize("kind", ["any", "mulsupcon", "msc", "dense"])
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


def saved_numbers(x: torch.Tensor, labels: torch.Tensor, **options: Any) -> list[int]:
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        F.multilabel_supcon_loss(x, labels, weighting="any", backend="cpp", **options)
    return saved


def test_memory_does_not_grow_with_the_square() -> None:
    """Scores that are kept take 3.5 times the memory of the vectors, or the 1 MB of a small problem."""
    x, labels = make_features(3000, 40), make_labels(3000, 8)
    assert max(saved_numbers(x.requires_grad_(), labels)) <= 2 * 3000 + 3.5 * 3000 * 40
    assert max(saved_numbers(x[:300], labels[:300])) <= 2 * 300 + (1 << 18)
    assert saved_numbers(x.detach(), labels) == []


@pytest.mark.parametrize("kind", ["any", "mulsupcon", "jaccard", "overlap", "simdis", "msc", "dense"])
@pytest.mark.parametrize("kept", ["everything", "half", "sums", "nothing"])
def test_the_backward_takes_what_was_kept(
    monkeypatch: pytest.MonkeyPatch, kept: str, kind: str, every_isa: str
) -> None:
    leaves, options, want = large(kind, "both", 0.1)
    n = 223 * 2
    keep = {"everything": extension().mlc_keep(n, 9), "half": 2 * n + n * n // 4, "sums": 2 * n, "nothing": 0}[kept]
    monkeypatch.setattr(mlc, "numbers_to_keep", lambda *_: keep)
    assert_near(run(leaves, backend="cpp", **options), want, ["loss", *leaves])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("msc", "dense")])
@pytest.mark.parametrize(("anchors", "keys"), [(9, 700), (223, 331), (400, 5)])
def test_keys_that_pass_by_once(anchors: int, keys: int, kind: str, every_isa: str) -> None:
    """Keys without gradient, with scores whose exponentials stay in range (0.1) and with others (0.02: two sweeps)."""
    for tau in (0.1, 0.02):
        leaves, options = problem(kind, "keys", (anchors, 2, 40, 19, keys), "ignored", torch.float32)
        leaves["temperature"], queue = torch.tensor(tau), leaves.pop("keys")
        got = run(leaves, backend="cpp", keys=queue, **options)
        wide = {name: leaf.double() for name, leaf in leaves.items()}
        want = run(wide, backend="torch", keys=queue.double(), **options)
        assert_near(got, want, ["loss", *leaves])
        assert max(saved_numbers(leaves["features"].requires_grad_(), options["labels"], keys=queue, **{
            "key_labels": options["key_labels"], "include_batch": False,
        })) <= 2 * max(anchors * 2, keys) * 40 + 1  # fmt: skip


@pytest.mark.parametrize("classes", [1, 31, 32, 33, 64, 65])
def test_label_values_are_read_to_the_last_class(classes: int) -> None:
    for dtype in (torch.int8, torch.uint8, torch.float16, torch.float64, torch.int64):
        labels = torch.zeros(5, classes, dtype=dtype)
        labels[2, -1] = 2
        with pytest.raises(ValueError, match="labels"):
            F.multilabel_supcon_loss(make_features(5, 8), labels, weighting="any", backend="cpp")
