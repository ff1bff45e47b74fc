"""Inputs and comparisons that tests and benchmarks share, so that what is timed is what is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RAGGED = (
    "random",
    "none",
    "single_pair",
    "one_row_per_class",
    "one_huge_class",
    "all_active",
    "empty_images",
    "ignored",
)


@dataclass(frozen=True)
class Shape:
    """Size of a contrastive problem: images, views, classes, embedding width, labels per image."""

    b: int
    v: int
    c: int
    d: int
    labels_per_image: float = 2.9

    def __str__(self) -> str:
        return f"B{self.b}-V{self.v}-C{self.c}-D{self.d}"


COCO = Shape(b=32, v=2, c=80, d=1024)


def make_labels(b: int, c: int, pattern: str = "random", labels_per_image: float = 2.9, seed: int = 0) -> Tensor:
    """Multi-hot float32 labels ``[b, c]`` of a named ragged case out of :data:`RAGGED`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(b, c, device="cpu")
    if pattern in ("random", "empty_images", "ignored"):
        labels = (torch.rand(b, c, generator=generator, device="cpu") < labels_per_image / c).float()
        if pattern == "empty_images":
            labels[::2] = 0
        if pattern == "ignored":
            labels[torch.rand(b, c, generator=generator, device="cpu") < 0.2] = -1
    elif pattern == "single_pair":
        labels[b // 2, c // 2] = 1
    elif pattern == "one_row_per_class":
        labels[[category % b for category in range(c)], list(range(c))] = 1
    elif pattern == "one_huge_class":
        labels[:, c // 2] = 1
    elif pattern == "all_active":
        labels[:] = 1
    elif pattern != "none":
        raise ValueError(f"pattern: expected one of {', '.join(RAGGED)}, got {pattern!r}")
    return labels


def make_features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, clustered: float = 0.5) -> Tensor:
    """Features ``[..., C, D]`` that share a direction per class, so that positives differ from negatives."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(shape[-2], shape[-1], generator=generator, device="cpu")
    return (torch.randn(*shape, generator=generator, device="cpu") + clustered * centres).to(dtype)


def value_and_grads(
    function: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``function(*inputs)`` and its gradients with respect to every floating input, all detached."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(value, wanted, grad_outputs=upstream)
    return (value.detach(), *(grad.detach() for grad in grads))


def row_errors(got: Tensor, truth: Tensor) -> Tensor:
    """The largest absolute error of each row (last dimension) against a float64 truth."""
    error = (got.double() - truth.double()).abs()
    return error.reshape(-1, error.shape[-1]).amax(dim=1) if error.dim() > 0 else error.reshape(1)


def assert_within_budget(
    name: str, got: Tensor, peer: Tensor, truth: Tensor, *, terms: float = 0.0, largest_score: float = 0.0
) -> None:
    """Require, row by row, at most twice torch's largest error plus 1e-6 of the row's largest value.

    Args:
        name: of the tensor, for the message.
        got: our result.
        peer: torch's, from the same inputs in the same dtype.
        truth: float64.
        terms: size of the terms whose difference the value is, where the value itself may be 0 by cancellation.
        largest_score: size of float32 scores that are exponentiated: their own rounding, 2^-24 of it, replaces the
            1e-6 where it is larger (both results are then off by a random multiple of it, row by row).
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    rows = truth.double().abs()
    largest = rows.reshape(-1, rows.shape[-1]).amax(dim=1) if rows.dim() > 0 else rows.reshape(1)
    largest = largest.clamp(min=terms)
    ours = row_errors(got, truth)
    budget = 2 * row_errors(peer, truth) + max(1e-6, 2**-24 * largest_score) * largest
    worst = (ours - budget).argmax()
    assert (ours <= budget).all(), (
        f"{name}: row {worst.item()} is off by {ours[worst]:.3g}, budget {budget[worst]:.3g} "
        f"({(ours > budget).sum().item()} of {ours.numel()} rows over)"
    )


class poisoned_allocations:
    """Context in which ``torch.empty`` and ``new_empty`` come filled with NaN (or the largest integer)."""

    def __enter__(self) -> poisoned_allocations:
        self._previous: tuple[Any, ...] = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        enabled, warn_only, fill = self._previous
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in several layouts: contiguous, permuted, with a gap, and offset in a larger buffer."""
    yield "contiguous", x
    yield "permuted", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "every_other", torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    padded = x.new_full((x.shape[0] + 1, *x.shape[1:]), torch.nan)
    padded[1:] = x
    yield "offset", padded[1:]
