"""Label attention in plain torch, in two exact forms, and the cost model that picks one.

*plain*: project keys and values of all B L positions, then attend (scaled_dot_product_attention where no
weights are asked for). *folded*: with C < L it is cheaper to move the projections to the label side::

    q_bch . (W_k,h (m_bl + pos_l) + b_k,h) = (W_k,h^T q_bch) . (m_bl + pos_l) + const    (softmax drops it)
    sum_l a_bhcl (W_v,h m_bl + b_v,h)      = W_v,h (sum_l a_bhcl m_bl) + b_v,h sum_l a_bhcl

For queries that the batch shares, the folded queries and their scores with shared positions are made once a
batch. The spec is :func:`sadcl.reference.label_attention.label_attention`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import resolve
from .._checks import check_floating, check_same_device, check_size, check_tensor
from ..reference.label_attention import label_attention as _reference

FORMS = ("plain", "folded")
_IMPLEMENTED = ("torch",)


@dataclass(frozen=True)
class Projections:
    """The four projections of one attention block, packed as nn.MultiheadAttention packs them."""

    in_weight: Tensor  # [3E, E]
    in_bias: Tensor | None  # [3E]
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None  # [E]
    num_heads: int

    def input(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight ``[E, E]`` and bias ``[E]`` of the query (0), key (1) or value (2) projection."""
        bias = None if self.in_bias is None else self.in_bias.chunk(3)[index]
        return self.in_weight.chunk(3)[index], bias

    def out(self, context: Tensor) -> Tensor:
        """Output projection of ``[B, C, E]``."""
        return F.linear(context, self.out_weight, self.out_bias)


def forward_macs(form: str, batch: int, classes: int, length: int, width: int, num_heads: int, shared: bool) -> int:
    """Multiply-accumulates of one forward: the whole cost model.

    ======================  ======================  ==============================
    step                    plain                   folded
    ======================  ======================  ==============================
    query projection        Q C E^2                 Q C E^2
    keys | folded queries   B L E^2                 Q C E^2
    values                  B L E^2                 B C E^2
    scores                  B C L E                 B H C L E (+ H C L E if shared)
    weighting               B C L E                 B H C L E
    output projection       B C E^2                 B C E^2
    ======================  ======================  ==============================

    Q is 1 for shared queries and B otherwise. Folding pays roughly while C < L and H L < E; the backward
    costs twice the forward in either form, so the same comparison decides training. The weights' softmax
    and the additions of positions are left out: they are the same or small.

    Args:
        form: ``"plain"`` or ``"folded"``.
        batch: B.
        classes: C.
        length: L.
        width: E.
        num_heads: H.
        shared: whether the queries are ``[C, E]``.

    Returns:
        The number of multiply-accumulates.
    """
    queries = 1 if shared else batch
    square = width * width
    ends = queries * classes * square + batch * classes * square
    if form == "plain":
        return ends + 2 * batch * length * square + 2 * batch * classes * length * width
    scores = (2 * batch + (1 if shared else 0)) * num_heads * classes * length * width
    return ends + queries * classes * square + batch * classes * square + scores


def choose_form(batch: int, classes: int, length: int, width: int, num_heads: int, shared: bool) -> str:
    """The form with fewer multiply-accumulates by :func:`forward_macs` (plain on a tie)."""
    plain, folded = (forward_macs(form, batch, classes, length, width, num_heads, shared) for form in FORMS)
    return "folded" if folded < plain else "plain"


def label_attention(
    query: Tensor,
    memory: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    *,
    memory_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    form: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend from C label queries to L positions; equations in the reference's docstring.

    Args:
        query: ``[C, E]`` (shared by the batch) or ``[B, C, E]``.
        memory: ``[B, L, E]``.
        in_proj_weight: ``[3E, E]``.
        in_proj_bias: ``[3E]`` or None.
        out_proj_weight: ``[E, E]``.
        out_proj_bias: ``[E]`` or None.
        num_heads: divides E.
        memory_pos: ``[L, E]`` or ``[B, L, E]``, added to the keys only.
        key_padding_mask: bool ``[B, L]``, True where padded.
        dropout: probability with which a weight is dropped (0 outside training).
        need_weights: also return the applied weights.
        form: ``"plain"``, ``"folded"`` or None for :func:`choose_form`.
        backend: None for the best on the device, or a backend's name.

    Returns:
        out ``[B, C, E]`` and, if asked, the weights as applied (after dropout) ``[B, heads, C, L]``.

    Raises:
        ValueError: if shapes or devices do not fit together.
        TypeError: if a dtype is wrong.
        RuntimeError: if the backend asked for cannot run.
    """
    _check_inputs(in_proj_weight.shape[-1], query, memory, memory_pos, key_padding_mask)
    if _resolved(backend, memory.device) == "reference":
        dropped = None
        if dropout > 0.0:
            shape = (memory.shape[0], num_heads, query.shape[-2], memory.shape[1])
            dropped = F.dropout(memory.new_ones(shape), dropout)
        out, applied = _reference(
            query,
            memory,
            in_proj_weight,
            in_proj_bias,
            out_proj_weight,
            out_proj_bias,
            num_heads,
            memory_pos=memory_pos,
            key_padding_mask=key_padding_mask,
            dropped=dropped,
        )
        return out, applied if need_weights else None
    projections = Projections(in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads)
    batch, length, width = memory.shape
    shared = query.dim() == 2
    if form is None:
        form = choose_form(batch, query.shape[-2], length, width, num_heads, shared)
    empty = keep = None
    if key_padding_mask is not None:
        empty = key_padding_mask.all(1)[:, None, None]
        keep = ~key_padding_mask[:, None, :] | empty  # a softmax of nothing is NaN; zeroed by `empty` later
        memory = memory.masked_fill(key_padding_mask[:, :, None], 0.0)
    attend = _folded if form == "folded" else _plain
    context, weights = attend(query, memory, projections, memory_pos, keep, empty, dropout, need_weights)
    return projections.out(context), weights


def _resolved(backend: str | None, device: torch.device) -> str:
    """The backend's name; without a wish there is nothing to probe, which torch.compile could not trace."""
    if backend is None and not os.environ.get("SADCL_BACKEND"):
        return _IMPLEMENTED[0]
    return resolve(backend, "label_attention", device, _IMPLEMENTED)


def _plain(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    keep: Tensor | None,
    empty: Tensor | None,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, length, width = memory.shape
    heads = projections.num_heads
    keys = memory if memory_pos is None else memory + memory_pos
    q = F.linear(query, *projections.input(0)).unflatten(-1, (heads, -1)).transpose(-3, -2)
    k = F.linear(keys, *projections.input(1)).view(batch, length, heads, -1).transpose(1, 2)
    v = F.linear(memory, *projections.input(2)).view(batch, length, heads, -1).transpose(1, 2)
    q = q.expand(batch, -1, -1, -1)  # [B, H, C, d]
    mask = None if keep is None else keep[:, None]
    if need_weights:
        scores = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-2, -1))
        weights = _normalise(scores, mask, None if empty is None else empty[:, None], dropout)
        context = torch.matmul(weights, v)
    else:
        weights = None
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if empty is not None:
            context = context.masked_fill(empty[:, None], 0.0)
    return context.transpose(1, 2).reshape(batch, -1, width), weights


def _folded(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    keep: Tensor | None,
    empty: Tensor | None,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, length, width = memory.shape
    heads, classes = projections.num_heads, query.shape[-2]
    folded = _fold_queries(query, projections)  # [HC, E] or [B, HC, E]
    if memory_pos is not None and memory_pos.dim() == 2 and folded.dim() == 2:
        scores = torch.matmul(folded, memory.transpose(1, 2)) + torch.matmul(folded, memory_pos.t())
    else:
        keys = memory if memory_pos is None else memory + memory_pos
        scores = torch.matmul(folded, keys.transpose(1, 2))  # [B, HC, L]
    weights = _normalise(scores, keep, empty, dropout)
    gathered = torch.bmm(weights.to(memory.dtype), memory).view(batch, heads, classes, width)
    value_weight, value_bias = projections.input(2)
    per_head = gathered.transpose(0, 1).reshape(heads, batch * classes, width)
    context = torch.bmm(per_head, value_weight.view(heads, -1, width).transpose(1, 2))  # [H, BC, d]
    context = context.view(heads, batch, classes, -1).permute(1, 2, 0, 3)
    if value_bias is not None:
        mass = weights.sum(-1).view(batch, heads, classes).transpose(1, 2)
        context = context + mass[..., None] * value_bias.view(heads, -1)
    context = context.reshape(batch, classes, width)
    return context, weights.view(batch, heads, classes, length) if need_weights else None


def _fold_queries(query: Tensor, projections: Projections) -> Tensor:
    """``W_k,h^T q_h / sqrt(d)`` for every head: ``[H*C, E]`` for shared queries, else ``[B, H*C, E]``."""
    heads, width = projections.num_heads, query.shape[-1]
    q = F.linear(query, *projections.input(0)) * (width // heads) ** -0.5
    per_head = q.reshape(-1, heads, width // heads).transpose(0, 1)  # [H, (B)C, d]
    key_weight = projections.input(1)[0].view(heads, -1, width)
    folded = torch.bmm(per_head, key_weight)  # [H, (B)C, E]
    if query.dim() == 2:
        return folded.flatten(0, 1)
    return folded.view(heads, *query.shape).transpose(0, 1).flatten(1, 2)


def _normalise(scores: Tensor, keep: Tensor | None, empty: Tensor | None, dropout: float) -> Tensor:
    """Softmax over positions, 0 where nothing may be attended to, then dropout."""
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    weights = scores.softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    return F.dropout(weights, dropout) if dropout > 0.0 else weights


def _check_inputs(
    width: int, query: Tensor, memory: Tensor, memory_pos: Tensor | None, key_padding_mask: Tensor | None
) -> None:
    check_tensor("memory", memory, (3,), "[B, L, E]")
    check_tensor("query", query, (2, 3), "[C, E] or [B, C, E]")
    named = {"query": query, "memory": memory}
    if memory_pos is not None:
        check_tensor("memory_pos", memory_pos, (2, 3), "[L, E] or [B, L, E]")
        check_size("memory_pos", memory_pos, -2, memory.shape[1], "L", "memory")
        named["memory_pos"] = memory_pos
    for name, value in named.items():
        check_floating(name, value)
        check_size(name, value, -1, width, "E", "embed_dim")
        if value.dim() == 3:
            check_size(name, value, 0, memory.shape[0], "B", "memory")
        check_same_device(name, value, "memory", memory)
    if 0 in memory.shape[1:] or query.shape[-2] == 0:
        raise ValueError(
            f"expected at least one position and one query, got memory {tuple(memory.shape)} "
            f"and query {tuple(query.shape)}"
        )
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask, (2,), "[B, L]")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask: expected bool (True = padded), got {key_padding_mask.dtype}")
        if key_padding_mask.shape != memory.shape[:2]:
            raise ValueError(
                f"key_padding_mask: expected [B, L]={list(memory.shape[:2])} as in memory, "
                f"got {list(key_padding_mask.shape)}"
            )
        check_same_device("key_padding_mask", key_padding_mask, "memory", memory)
