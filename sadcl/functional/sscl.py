"""The sample-to-sample contrastive loss as a function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._backends import by_name, resolve
from .._collectives import Group
from .._groups import GroupLike
from ..ops import group_rows as _rows
from ..ops import sscl as _sscl
from ..ops.compact import Active
from . import _arguments as arguments
from ._arguments import FORMULATIONS
from ._group import (
    check_backend,
    check_capacity,
    check_features,
    check_ring,
    over_group,
    reduce_part,
    rows_of_ranks,
    signature,
    together,
)
from ._reduce import REDUCTIONS, Weights, reduce
from .compact import check_active

BACKENDS = _sscl.sscl.backends


def sample_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    base_temperature: float | None = None,
    formulation: str = "paper",
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    active: Active | None = None,
    backend: str | None = None,
    group: GroupLike = None,
    ring: bool = False,
    capacity: int | None = None,
) -> Tensor:
    r"""Sample-to-sample contrastive loss (SSCL) between label embeddings.

    Rows ``(b, v, c)`` with ``labels[b, c] = 1`` attract the other rows of their class and repel all other rows, by
    cosine over ``temperature``:

        loss = 1/|I| * sum_{i: P(i) not empty} -1/|P(i)| * sum_{p in P(i)} log( e^{s_ip} / sum_{a in A(i)} e^{s_ia} )

    An anchor without a positive adds 0 and counts in ``|I|``; without any active row the loss is 0, connected to the
    graph. A zero vector has cosine 0 and gradient 0; NaN in an active row gives NaN.

    Source: SADCL (ECAI 2023), L_SSCL. ``formulation="released"`` gives the numbers of the authors' code
    (docs/faithfulness.md).

    Args:
        features: ``[B, V, C, D]`` or ``[B, C, D]``; float32, bfloat16, float16 or float64; any strides; not normalised.
        labels: ``[B, C]``, any real dtype: 1 active, 0 not, -1 ignored (the pair takes no part).
        temperature: number > 0, or a tensor of one element, which receives a gradient.
        base_temperature: the released loss is scaled by ``temperature / base_temperature``; ``None`` means 1.
            The paper's has no such factor.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"`` divides by the number of active rows, ``"sum"`` by nothing (released: its own factor
            without ``1 / (V sum(labels))``), ``"none"`` gives ``[B, V, C]``, 0 where inactive.
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a class's anchors.
        sample_weight: ``[B]`` of finite numbers >= 0, multiplies the loss of an image's anchors.
        active: :func:`compact_labels` of these labels, to compact once for several losses.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"torch"`` or ``"reference"`` (not with a
            group, where the released formulation has torch's operators alone). For None a CPU that multiplies bfloat16
            (AVX512_BF16) does so in the gradient, too, and rounds softmax weights of negatives to it; ``"cpp"`` keeps
            float32.
        group: contrast with the rows of all ranks of ``"world"``, a ProcessGroup, or a DeviceMesh of one dimension,
            which all call this with the same options; a rank may come without images (B = 0). The mean over ranks of
            ``"mean"`` and of ``"sum"`` is what one process gets for the concatenated batch, of value and gradients
            (each rank gets ``W`` times its own part); ``"none"`` gives the rank's own rows. docs/scaling.md.
        ring: with a group: vectors travel round instead of being gathered, for memory of ``2 N / W`` of them.
        capacity: with a group: the most active pairs of a rank; without it the host waits to hear how many there are.

    Returns:
        float32 (float64 for float64 features): a 0-d tensor, or ``[B, V, C]``.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: wrong ranks, sizes, devices, label values, temperature or choices; ranks of the group that disagree
            in them (on every rank alike).
        RuntimeError: a backend asked for by name cannot run.
    """

    def checked() -> _Checked:
        return _check(
            features, labels, temperature, base_temperature, formulation, reduction, class_weight, sample_weight,
            active, backend, group, ring, capacity,
        )  # fmt: skip

    x = together(group, features, checked)
    over = over_group(group, x.features.shape[0])
    if over is not None:
        return _over_ranks(x, over, formulation, reduction, base_temperature, ring, capacity)
    released = formulation == "released"
    if x.backend == "reference":
        rows = reference.sscl(x.features, x.active.target, x.tau, released).to(x.tau.dtype)
    else:
        mean = reduction == "mean" and not released and not x.weights.given and x.backend in _sscl.sscl_mean.backends
        rows_of = (x.features, x.active.pairs, x.active.class_ptr, x.tau)
        keep = _sscl.scores_to_keep(*rows_of, x.backend, released, mean)
        rounded = x.features.dtype == torch.bfloat16 and not by_name(backend)
        if mean:
            return _sscl.sscl_mean(_sscl.MeanInputs(*rows_of, keep, rounded), x.backend).mean
        inputs = _sscl.Inputs(*rows_of, normalize=True, released=released, keep=keep, rounded=rounded)
        rows = _sscl.sscl(inputs, x.backend).row_loss
    return finish(rows, x.active, released, x.scale, x.weights, reduction)


class _Checked(NamedTuple):
    """Arguments that may go together."""

    features: Tensor  # [B, V, C, D]
    tau: Tensor
    scale: Tensor | None
    weights: Weights
    active: Active
    backend: str


def _check(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    base_temperature: float | None,
    formulation: str,
    reduction: str,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    active: Active | None,
    backend: str | None,
    group: GroupLike,
    ring: bool,
    capacity: int | None,
) -> _Checked:
    check_features("features", features, (3, 4), "[B, V, C, D] or [B, C, D]", group)
    check_ring(ring, group)
    check_capacity(capacity, group)
    if features.dim() == 3:
        features = features.unsqueeze(1)
    b, v, c, _ = features.shape
    arguments.check_labels(labels, b, c, features)
    check.check_choice("formulation", formulation, FORMULATIONS)
    check.check_choice("reduction", reduction, REDUCTIONS)
    tau = check.as_temperature(temperature, features)
    scale = arguments.check_scale(tau, base_temperature, features)
    weights = arguments.check_weights(class_weight, sample_weight, b, c, features)
    if over_group(group, b) is not None:
        name = check_backend(backend, "sscl", features.device, formulation == "released")
    else:
        pairs = active.pairs.shape[0] if isinstance(active, Active) else b * c
        name = resolve(backend, "sscl", features.device, BACKENDS, _sscl.size_of(features, pairs * v))
    active = check_active(active, labels, name)
    return _Checked(arguments.in_range(features), tau, scale, weights, active, name)


def _over_ranks(
    x: _Checked,
    group: Group,
    formulation: str,
    reduction: str,
    base_temperature: float | None,
    ring: bool,
    capacity: int | None,
) -> Tensor:
    _, v, c, _ = x.features.shape
    same = signature(
        "sample_contrastive_loss", x.features, V=v, C=c, formulation=formulation, reduction=reduction,
        base_temperature=base_temperature, ring=ring, capacity=capacity,
    )  # fmt: skip
    out = rows_of_ranks(
        x.features, x.tau, _rows.IDS, same, group, x.backend, pairs=x.active.pairs, class_ptr=x.active.class_ptr,
        released=formulation == "released", ring=ring, capacity=capacity,
    )  # fmt: skip
    rows = out.row_loss if x.scale is None or formulation != "released" else out.row_loss * x.scale
    return reduce_part(x.weights.apply(rows), out.size[0], reduction, group)


def finish(
    rows: Tensor, active: Active, released: bool, scale: Tensor | None, weights: Weights, reduction: str
) -> Tensor:
    """What follows the op: the released anchor test and factor, weights, reduction of ``rows [B, V, C]``."""
    v = rows.shape[1]
    if released:
        rows = rows * released_anchors(active.target, v)
        if scale is not None:
            rows = rows * scale
    return reduce(weights.apply(rows), active.class_ptr[-1], reduction, times=v)


def released_anchors(target: Tensor, v: int) -> Tensor:
    """The released anchor test ``[B, V, C]``: row (b, v, c) is an anchor iff image ``(v B + b) // V`` has class c."""
    b = target.shape[0]
    view = torch.arange(v, device=target.device)
    image = torch.arange(b, device=target.device)
    return target[(view * b + image[:, None]) // v] == 1
