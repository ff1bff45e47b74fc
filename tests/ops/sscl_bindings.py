"""SSCL and compaction called through their bindings, and both formulations in float64 numpy to hold them against.

The oracle is the equations of sadcl/reference/sscl.py, written densely in numpy; the op layer above has its own tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from sadcl.ops._native import array

_C = pytest.importorskip("sadcl._C", reason="the CPU extension is not built")


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A fresh allocation in which whatever is not written stays visible."""
    return (
        torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.full(shape, 77, dtype=dtype)
    )


def compact(labels: Tensor, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    B, C = labels.shape
    pairs, class_ptr = poisoned(B * C, dtype=torch.int32), poisoned(C + 1, dtype=torch.int32)
    target = poisoned(B, C, dtype=torch.int8)
    out = {"pairs": array(pairs), "class_ptr": array(class_ptr), "target": array(target)}
    _C.compact(labels=array(labels), **out, threads=threads)
    return pairs, class_ptr, target


@dataclass
class Run:
    """One forward and backward through the bindings."""

    features: Tensor
    labels: Tensor
    temperature: float = 0.2
    normalize: bool = True
    released: bool = False
    threads: int = 2
    backward_threads: int | None = None
    keep: int | None = None  # scores; as many as the op layer keeps of a small problem
    anchor_weights: Tensor | None = None
    groups: tuple[Tensor, Tensor] | None = None
    row_loss: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    grad_temperature: float = field(init=False)

    def __post_init__(self) -> None:
        x = self.features
        B, V, C, _ = x.shape
        pairs, class_ptr = self.groups or compact(self.labels)[:2]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = V * pairs.numel()
        self.row_loss, self.lse = poisoned(B, V, C, dtype=acc), poisoned(2, rows, dtype=acc)
        self.norm = poisoned(rows, dtype=torch.float64)
        self.kept = poisoned(min(rows * rows, _C.SSCL_FEW_SCORES) if self.keep is None else self.keep, dtype=acc)
        given = {
            "features": x, "pairs": pairs, "class_ptr": class_ptr,
            "temperature": torch.tensor(self.temperature, dtype=torch.float64),
            "lse": self.lse, "norm": self.norm, "kept": self.kept,
        }  # fmt: skip
        arrays = {name: array(tensor) for name, tensor in given.items()} | {"normalize": self.normalize}
        _C.sscl_forward(**arrays, released=self.released, row_loss=array(self.row_loss), threads=self.threads)
        if self.anchor_weights is None:
            self.anchor_weights = torch.full((B, V, C), 1 / max(V * int(class_ptr[-1]), 1), dtype=acc)
        self.grad = poisoned(*x.shape, dtype=x.dtype)
        grad_temperature = poisoned(dtype=torch.float64)
        _C.sscl_backward(
            **arrays,
            grad_row_loss=array(self.anchor_weights),
            grad_features=array(self.grad),
            grad_temperature=array(grad_temperature),
            threads=self.backward_threads or self.threads,
        )
        self.grad_temperature = grad_temperature.item()
        self.active = V * int(class_ptr[-1])

    def tensors(self) -> list[Tensor]:
        return [self.row_loss, self.lse, self.norm, self.kept, self.grad, torch.tensor(self.grad_temperature)]


@dataclass
class Truth:
    row_loss: np.ndarray
    lse: np.ndarray
    grad: np.ndarray
    grad_temperature: float


def oracle(x, labels, temperature, weights, normalize=True, released=False, group_of=None) -> Truth:
    """Both formulations in float64 with every N x N matrix written out; weights [B, V, C] are dL/drow_loss."""
    x = np.asarray(x, np.float64)
    B, V, C, D = x.shape
    place = [(b, v, c) for c in range(C) for b in range(B) if labels[b, c] == 1 for v in range(V)]
    if group_of is not None:
        place.sort(key=lambda p: (group_of[p[0]], p[0], p[1]))
    row_loss, grad = np.zeros((B, V, C)), np.zeros_like(x)
    n = len(place)
    if n == 0:
        return Truth(row_loss, np.zeros(0), grad, 0.0)
    at = tuple(np.array(place).T)
    rows = x[at]
    norm = np.sqrt((rows**2).sum(1)) if normalize else np.ones(n)
    z = np.divide(rows, norm[:, None], out=np.zeros_like(rows), where=norm[:, None] > 0)
    s = z @ z.T / temperature
    group = at[2] if group_of is None else np.array(group_of)[at[0]]
    other = ~np.eye(n, dtype=bool)
    positive = (group[:, None] == group[None, :]) & other
    k = positive.sum(1)
    has = k > 0
    hidden = np.where(other, s, -np.inf)
    peak = np.maximum(hidden.max(1), 0) if released else np.where(n > 1, hidden.max(1), 0.0)
    total = np.exp(hidden - peak[:, None]).sum(1) + (1e-5 if released else 0.0)
    with np.errstate(divide="ignore"):
        lse = np.where(has, peak + np.log(total), np.inf)
    lifted = np.zeros((n, n))
    if released:
        for i in range(n):
            for p in np.flatnonzero(positive[i]):
                (b, v, _), (b2, v2, _) = place[i], place[p]
                shared = [c for c in range(C) if labels[b, c] == 1 and labels[b2, c] == 1]
                scores = [s[place.index((b, v, c)), place.index((b2, v2, c))] for c in shared]
                lifted[i, p] = max(scores + ([0.0] if len(shared) < C else []))
    mean = np.where(positive, s - lifted, 0).sum(1) / np.maximum(k, 1)
    row_loss[at] = np.where(has, lse - (peak if released else 0) - mean, 0) if has.any() else 0
    m = np.where(has, np.asarray(weights, np.float64)[at], 0)
    a = np.where(other, m[:, None] * np.exp(np.where(has[:, None], hidden - lse[:, None], -np.inf)), 0)
    a -= np.where(positive, m[:, None] / np.maximum(k, 1)[:, None], 0)
    g = (a + a.T) @ z / temperature
    radial = (z * g).sum(1)
    if normalize:
        g = np.divide(g - z * radial[:, None], norm[:, None], out=np.zeros_like(g), where=norm[:, None] > 0)
    grad[at] = g
    return Truth(row_loss, lse, grad, -radial.sum() / (2 * temperature))


def close(got: Tensor, want: np.ndarray, relative: float, floor: float = 1e-6) -> None:
    """Row by row: each row's error against its largest value plus what its terms were before they cancelled."""
    got = got.double().numpy()
    assert np.isfinite(got).all()
    rows_got, rows_want = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
    error = np.abs(rows_got - rows_want).max(1)
    scale = np.abs(rows_want).max(1) + 1e-2 * np.abs(rows_want).max() + floor
    assert (error <= relative * scale).all(), (error / scale).max()


def check(run: Run, truth: Truth, relative: float) -> None:
    n = run.active
    close(run.row_loss, truth.row_loss, relative, 0.1)
    pivot, log_sum = run.lse[:, :n].double().numpy()
    got = pivot / run.temperature + log_sum
    assert (np.isinf(got) == np.isinf(truth.lse)).all()
    np.testing.assert_allclose(got[np.isfinite(got)], truth.lse[np.isfinite(truth.lse)], rtol=relative, atol=relative)
    assert not run.lse[:, n:].any() and not run.norm[n:].any()
    lengths = run.norm[:n][run.norm[:n] > 0]
    terms = run.anchor_weights.abs().max().item() / run.temperature / (lengths.min().item() if len(lengths) else 1)
    close(run.grad, truth.grad, relative, 0.1 * terms)
    assert math.isclose(run.grad_temperature, truth.grad_temperature, rel_tol=5 * relative, abs_tol=5 * relative)


def make(B: int, V: int, C: int, D: int, density: float = 0.4, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, V, C, D, generator=g, dtype=torch.float64)
    x = x + 0.7 * torch.randn(1, 1, C, D, generator=g, dtype=torch.float64)  # classes differ
    labels = (torch.rand(B, C, generator=g) < density).to(torch.uint8)
    weights = torch.rand(B, V, C, generator=g, dtype=torch.float64) / (B * V)
    return x.to(dtype), labels, weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
