"""The float64 truth of every declared op, from its inputs: what :mod:`sadcl.reference` says, or a plain product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..functional.sscl import released_anchors
from ..ops import mlc
from ..reference.label_attention import label_attention as _attend

Results = tuple[Tensor, ...]


def _compact(x: Any) -> Results:
    labels = x.labels.double()
    b, c = labels.shape
    pairs = [i * c + k for k in range(c) for i in range(b) if labels[i, k] == 1]
    ends = [sum(1 for pair in pairs if pair % c <= k) for k in range(c)]
    size = b * c if x.capacity is None else min(x.capacity, b * c)
    filled = (pairs + [0] * size)[:size]
    return torch.tensor(filled, device="cpu"), torch.tensor([0, *ends], device="cpu"), labels


def _target(x: Any) -> Tensor:
    """Labels ``[B, C]`` of compacted pairs, whose segments are the classes."""
    b, _, c, _ = x.features.shape
    target = torch.zeros(b * c, device="cpu")
    target[x.pairs[: int(x.class_ptr[-1])].long()] = 1.0
    return target.view(b, c)


def _sscl(x: Any) -> Results:
    features = x.features
    if not x.normalize:  # the oracle normalises: of rows that share a length, a temperature does the same
        raise ValueError("the oracle of unnormalised rows is supcon's")
    return (reference.sscl(features, _target(x), x.temperature, x.released),)


def _sscl_mean(x: Any) -> Results:
    target = _target(x)
    rows = reference.sscl(x.features, target, x.temperature, False)
    return (rows.sum() / (target.sum() * x.features.shape[1]).clamp(min=1),)


def _pscl(x: Any) -> Results:
    return (reference.pscl(x.features, x.prototypes, x.target, x.temperature, x.released),)


def _pscl_mean(x: Any) -> Results:
    classes = reference.pscl(x.features, x.prototypes, x.target, x.temperature, False)
    return (classes.sum() / (x.target == 1).sum().clamp(min=1),)


def _group_rows(x: Any) -> Results:
    if x.pairs is not None:
        target = _target(x)
        rows = reference.sscl(x.features, target, x.temperature, x.released)
        return (rows * released_anchors(target, x.features.shape[1]) if x.released else rows,)
    return tuple(loss[:, :, None] for loss in _mlc(x._replace(features=x.features[:, :, 0])))


def _asl(x: Any) -> Results:
    constants = (x.gamma_neg, x.gamma_pos, x.clip, x.eps, x.detach_focal_weight)
    loss = reference.asl(x.logits, x.labels, *constants)
    if x.class_weight is not None:
        loss = loss * x.class_weight.double()
    return (loss.sum(1) if x.sum_classes else loss,)


def _mlc(x: Any) -> Results:
    weighting = "" if x.weighting == mlc.DENSE else mlc.WEIGHTINGS[x.weighting]
    options = {name: getattr(x, name) for name in ("threshold", "alpha", "beta", "include_batch", "normalize")}
    tensors = {name: getattr(x, name) for name in ("keys", "key_labels", "prototypes", "weights", "class_weight")}
    return (reference.mlc(x.features, x.labels, x.temperature, weighting, **tensors, **options),)


def _dual(x: Any) -> Results:
    views = x.embeddings[:, None] if x.bank is None else torch.stack([x.embeddings, x.bank], 1)
    rows = reference.sscl(views, x.target, x.sample_temperature, x.released)
    classes = reference.pscl(x.embeddings, x.prototypes, x.target, x.prototype_temperature, x.released)
    if not x.mean:
        return rows, classes
    count = (x.target == 1).sum()
    return rows.sum() / (views.shape[1] * count).clamp(min=1), classes.sum() / count.clamp(min=1)


def _dual_mean(x: Any) -> Results:
    views, target = torch.stack([x.embeddings, x.bank], 1), x.labels.double()
    count = (x.labels == 1).sum()
    rows = reference.sscl(views, target, x.sample_temperature, False)
    classes = reference.pscl(x.embeddings, x.prototypes, target, x.prototype_temperature, False)
    return rows.sum() / (2 * count).clamp(min=1), classes.sum() / count.clamp(min=1)


def _linear(x: Any) -> Results:
    product = x.x.double() @ x.weight.double().t()
    return (product if x.bias is None else product + x.bias.double(),)


def _label_attention(x: Any) -> Results:
    dropped = None
    batch, length, _ = x.memory.shape
    if x.survivors is not None:
        dropped = (x.survivors.double() * x.keep_scale).view(batch, length, x.heads, -1).permute(0, 2, 3, 1)
    out, weights = _attend(
        x.query, x.memory, x.in_weight, x.in_bias, x.out_weight, x.out_bias, x.heads,
        memory_pos=x.memory_pos, key_padding_mask=x.padded, dropped=dropped,
    )  # fmt: skip
    return out, weights.permute(0, 3, 1, 2).reshape(batch, length, -1)


def _label_attention_core(x: Any) -> Results:
    """Without dropout, whose draws are the kernel's own."""
    query, keys = x.query.double(), x.keys.double()
    groups = keys.shape[2]
    values = keys if x.values is None else x.values.double()
    if x.pos is not None:
        keys = keys + x.pos.double()[:, :, None]
    heads = query.shape[2]
    keys, values = (t.expand(-1, -1, heads, -1) if groups == 1 else t for t in (keys, values))
    scores = x.scale * torch.einsum("bchd,blhd->bhcl", query.expand(keys.shape[0], -1, -1, -1), keys)
    if x.padded is not None:
        scores = scores.masked_fill(x.padded[:, None, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    context = torch.einsum("bhcl,blhd->bchd", weights, values)
    return context, weights.sum(-1), weights if x.need_weights else weights.new_empty(0)


# Results of an op's inputs, as float64; by op.
ORACLES: dict[str, Callable[[Any], Results]] = {
    "asl": _asl,
    "asl_total": lambda x: (_asl(x)[0].sum(),),
    "bank_update": lambda x: (reference.bank_update(*x),),
    "compact": _compact,
    "dual": _dual,
    "dual_mean": _dual_mean,
    "group_classifier": lambda x: (reference.group_classifier(*x),),
    "group_pscl": _pscl,
    "group_rows": _group_rows,
    "label_attention": _label_attention,
    "label_attention_core": _label_attention_core,
    "linear": _linear,
    "mlc": _mlc,
    "pscl": _pscl,
    "sscl": _sscl,
    "sscl_mean": _sscl_mean,
    "pscl_mean": _pscl_mean,
    "two_way": lambda x: reference.two_way(*x),
    "zlpr": lambda x: (reference.zlpr(*x),),
}
