"""Op ``group_pscl``: PSCL over the images of all ranks of a group, one number per class, the same on every rank.

Scores are of own images, by the op ``pscl`` itself. What the ranks tell each other is, in the forward, two log-sum-exps
and a maximum a class, which are merged in rank order, and in the backward the upstream gradients of their classes.
Gradients of prototypes and temperature are this rank's parts. Oracle: that of ``pscl`` on the concatenated batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._collectives import Group, all_gather, meet
from ._library import Backward, Op
from .pscl import Inputs as One
from .pscl import Outputs as OneOutputs
from .pscl import allocate as allocate_one
from .pscl import pscl


class Inputs(NamedTuple):
    """This rank's part of a batch."""

    features: Tensor  # [B, C, D] of any strides; B may be 0
    prototypes: Tensor  # [C, D], the same on all ranks
    target: Tensor  # int8 [B, C], see sadcl.ops.compact.Active
    temperature: Tensor  # [] in the accumulation dtype
    after: Tensor | None  # the loss whose collectives come first, in forward and, the other way round, in backward
    released: bool  # add the released code's term for classes without a positive
    waits: bool  # the host hears whether the ranks agree
    signature: str  # what ranks must agree in
    group: str  # "": this process alone
    rank: int
    world: int


class Outputs(NamedTuple):
    """The loss, how it is shared out, and what the backward reads."""

    class_loss: Tensor  # accumulation dtype [C]
    positives: Tensor  # int64 [C]: images of all ranks that have the class
    score: Tensor  # norm dtype [B, C]
    norm_x: Tensor  # norm dtype [B, C]
    norm_p: Tensor  # norm dtype [C]
    lse: Tensor  # norm dtype [2, C]: over all images of all ranks, over the positive ones


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    one = allocate_one(_own(x))
    return Outputs(one.class_loss, x.features.new_empty(x.features.shape[1], dtype=torch.int64), *one[1:])


def _own(x: Inputs) -> One:
    """PSCL of this rank's images alone."""
    return One(x.features, x.prototypes, x.target, x.temperature, x.released)


def _forward(backend: str) -> Callable[[Inputs], Outputs]:
    def forward(x: Inputs) -> Outputs:
        group = Group(x.group, x.rank, x.world)
        images = x.features.shape[0]
        meet(x.signature, images, images, 0, x.temperature, 0, x.waits, group)
        own = pscl.run(_own(x), backend)
        highest = own.score.new_full(own.score.shape[1:], float("-inf"))
        if images > 0:
            highest = torch.where(x.target == -1, float("-inf"), own.score).amax(dim=0)
        positives = (x.target == 1).sum(dim=0)
        said = all_gather(torch.stack([*own.lse, highest, positives.to(own.lse.dtype)]), group)  # [W, 4, C]
        lse = torch.logsumexp(said[:, :2], dim=0)
        number = said[:, 3].sum(dim=0)
        loss = torch.where(number > 0, lse[0] - lse[1], 0.0)
        if x.released:
            known = lse[0] != float("-inf")
            loss = torch.where((number == 0) & known, lse[0] - said[:, 2].amax(dim=0), loss)
        return Outputs(loss.to(own.class_loss.dtype), number.long(), own.score, own.norm_x, own.norm_p, lse)

    return forward


def _backward(backend: str) -> Callable[..., Any]:
    def backward(upstream: Any, x: Inputs, saved: Outputs, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        group = Group(x.group, x.rank, x.world)
        # A rank's own classes need not be those that have a positive: the term of all images has to be there.
        given = all_gather(upstream.grad_class_loss, group).sum(dim=0)
        if not x.released:
            given = torch.where(saved.lse[1] == float("-inf"), 0.0, given)
        one = _own(x)._replace(released=True)
        assert pscl.derivative is not None
        own = OneOutputs(given, saved.score, saved.norm_x, saved.norm_p, saved.lse)
        grads = pscl.derivative.grads(pscl.derivative.upstream(given), one, own, wanted, backend)._asdict()
        return grads if x.after is None else {**grads, "grad_after": torch.zeros_like(x.after)}

    return backward


group_pscl = Op(
    "group_pscl",
    Inputs,
    Outputs,
    allocate,
    {name: _forward(name) for name in pscl.backends},
    Backward(
        gradients=("features", "prototypes", "temperature", "after"),
        implementations={name: _backward(name) for name in pscl.backends},
        instead="the loss of one process, backend='reference'",
    ),
)
