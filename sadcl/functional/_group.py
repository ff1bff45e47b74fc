"""Losses over the ranks of a process group: what their functions share."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checks as check
from .._backends import resolve
from .._collectives import Group, refuse
from .._groups import GroupLike, find_group
from ..ops import group_rows as _rows
from ..ops._transforms import watched

T = TypeVar("T")


def check_features(name: str, value: object, dims: tuple[int, ...], layout: str, group: GroupLike) -> Tensor:
    """Features of a loss; with a group they may be of no image."""
    features = check.check_tensor(name, value, dims, layout)
    check.check_floating(name, features)
    if group is None or 0 in features.shape[1:]:
        check.check_nonempty(name, features)
    return features


def over_group(group: GroupLike, images: int) -> Group | None:
    """The group to compute over, None where this process computes alone as it always did."""
    found = find_group(group)
    return None if found is not None and found.world == 1 and images > 0 else found


def together(group: GroupLike, like: Any, run: Callable[[], T]) -> T:
    """What ``run`` checks and makes of the arguments, before the ranks meet; where it raises, they are told.

    A compiler sees ``run`` alone: what it raises, it raises while the others wait.
    """
    if group is None or torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (TypeError, ValueError, RuntimeError) as error:
        found = find_group(group)
        if found is None or found.world == 1:
            raise
        device = like.device if isinstance(like, Tensor) else torch.device("cpu")
        refuse(error, device, found)


def check_backend(backend: str | None, op: str, device: torch.device, released: bool = False) -> str:
    """The backend that reads the rows of all ranks. The released formulation is computed by torch's operators alone.

    What ``SADCL_BACKEND`` says is a default: torch's operators stand for a backend that has no such kernels.
    """
    have = ("torch",) if released else _rows.group_rows.backends
    if backend is None and os.environ.get("SADCL_BACKEND", "") not in ("", *have):
        return "torch"
    name = resolve(backend, f"{op} over a group", device, have)
    if name == "reference":
        raise ValueError(f"backend: expected None or one of {', '.join(have)} with a group, got 'reference'")
    return name


def check_capacity(capacity: int | None, group: GroupLike) -> int:
    """The most items a rank may have; 0 for any number."""
    if capacity is None:
        return 0
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity: expected None or an integer > 0, got {capacity!r}")
    if group is None:
        raise ValueError("capacity: expected None without a group (it is what a rank may bring)")
    return capacity


def check_ring(ring: bool, group: GroupLike) -> None:
    if not isinstance(ring, bool):
        raise TypeError(f"ring: expected a bool, got {type(ring).__name__}")
    if ring and group is None:
        raise ValueError("ring: expected False without a group")


def signature(loss: str, features: Tensor, **options: Any) -> str:
    """What ranks must agree in, as :func:`sadcl._collectives.meet` takes it."""
    *_, d = features.shape
    parts = {"loss": loss, "D": d, "dtype": str(features.dtype).removeprefix("torch."), **options}
    return "; ".join(f"{name}={_said(value)}" for name, value in parts.items())


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor " + "x".join(map(str, value.shape)) if value.dim() else "tensor"
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return str(operator.index(value))  # a compiler's symbol becomes a number
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def reduce_part(rows: Tensor, count: Tensor | None, reduction: str, group: Group) -> Tensor:
    """``rows`` as they are; or ``world`` times this rank's part of their sum, or of their mean over ``count``.

    The mean over ranks of that is the whole: what DDP and FSDP make of it.
    """
    if reduction == "none":
        return rows
    total = rows.sum() * group.world
    return total / count.clamp(min=1) if reduction == "mean" and count is not None else total


def features_of_all(features: Tensor) -> Tensor:
    """Features that ask for a gradient where gradients are recorded: all ranks go backward together, or none does.

    A rank that comes without images may have made its features of nothing.
    """
    if torch.is_grad_enabled() and not features.requires_grad and not watched(features):
        return features.detach().requires_grad_()
    return features


def rows_of_ranks(
    features: Tensor,
    tau: Tensor,
    weighting: int,
    same: str,
    group: Group,
    backend: str,
    *,
    ring: bool,
    capacity: int | None,
    **given: Any,
) -> _rows.Outputs:
    """Op ``group_rows`` of ``features [B, V, C, D]``; ``given`` are its other inputs, where they are not the usual."""
    features = features_of_all(features)
    inputs = _USUAL._replace(
        features=features, temperature=tau, weighting=weighting, signature=same, group=group.name, rank=group.rank,
        world=group.world, ring=ring, capacity=capacity or 0, keep=_rows.what_to_keep(capacity or 0, features), **given,
    )  # fmt: skip
    return _rows.group_rows(inputs, backend)


_NONE: Any = None
_USUAL = _rows.Inputs(
    _NONE, None, None, None, None, None, None, None, None, None, _NONE, 0, 0.0, 1.0, 1.0,
    include_batch=True, normalize=True, released=False, ring=False, capacity=0, keep=0,
    signature="", group="", rank=0, world=1,
)  # fmt: skip
