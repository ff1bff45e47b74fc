"""Label attention in plain torch, in both forms: any device, traceable, exportable, differentiable forward.

Differentiable twice, but for the plain form where torch's fused attention computes it (on a CPU, without weights asked
for), whose own backward has no derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import forward_mode


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

    def to(self, dtype: torch.dtype) -> Projections:
        """The same projections in another dtype."""
        biases = [None if bias is None else bias.to(dtype) for bias in (self.in_bias, self.out_bias)]
        return Projections(self.in_weight.to(dtype), biases[0], self.out_weight.to(dtype), biases[1], self.num_heads)

    def out(self, context: Tensor) -> Tensor:
        """Output projection of ``[B, C, E]``."""
        return F.linear(context, self.out_weight, self.out_bias)


def attend(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    need_weights: bool,
    form: str,
) -> tuple[Tensor, Tensor | None]:
    """Context after the output projection and, if asked, the applied weights ``[B, heads, C, L]``."""
    empty = keep = None
    if key_padding_mask is not None:
        empty = key_padding_mask.all(1)[:, None, None]
        keep = ~key_padding_mask[:, None, :] | empty  # a softmax of nothing is NaN; zeroed by `empty` later
        memory = memory.masked_fill(key_padding_mask[:, :, None], 0.0)
    run = _folded if form == "folded" else _plain
    context, weights = run(query, memory, projections, memory_pos, keep, empty, dropout, need_weights)
    return projections.out(context), weights


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
    batch, _, width = memory.shape
    heads = projections.num_heads
    keys = memory if memory_pos is None else memory + memory_pos
    split = (heads, width // heads)
    q = F.linear(query, *projections.input(0)).unflatten(-1, split).transpose(-3, -2)
    k = F.linear(keys, *projections.input(1)).unflatten(-1, split).transpose(1, 2)
    v = F.linear(memory, *projections.input(2)).unflatten(-1, split).transpose(1, 2)
    q = q.expand(batch, -1, -1, -1)  # [B, H, C, d]
    mask = None if keep is None else keep[:, None]
    if need_weights or forward_mode():  # which torch's fused attention has not
        scores = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-2, -1))
        weights = _normalise(scores, mask, None if empty is None else empty[:, None], dropout)
        context = torch.matmul(weights, v)
    else:
        weights = None
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if empty is not None:
            context = context.masked_fill(empty[:, None], 0.0)
    return context.transpose(1, 2).flatten(2), weights if need_weights else None


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
    context = context.view(heads, batch, classes, width // heads).permute(1, 2, 0, 3)
    if value_bias is not None:
        mass = weights.sum(-1).view(batch, heads, classes).transpose(1, 2)
        context = context + mass[..., None] * value_bias.view(heads, -1)
    context = context.reshape(batch, classes, width)
    return context, weights.view(batch, heads, classes, length) if need_weights else None


def _fold_queries(query: Tensor, projections: Projections) -> Tensor:
    """``W_k,h^T q_h / sqrt(d)`` for every head: ``[H*C, E]`` for shared queries, else ``[B, H*C, E]``."""
    heads, width = projections.num_heads, query.shape[-1]
    q = F.linear(query, *projections.input(0)) * (width // heads) ** -0.5
    per_head = q.flatten(0, -2).unflatten(-1, (heads, width // heads)).transpose(0, 1)  # [H, (B)C, d]
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
