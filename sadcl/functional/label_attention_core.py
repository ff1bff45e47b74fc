"""Label attention on a GPU: torch's projections (cuBLAS, torch's autograd, under torch's autocast) around one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import label_attention_core as _core
from ..portable.label_attention import Projections


def attend(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    need_weights: bool,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The attention block: projections, the op, the output projection.

    Returns:
        out ``[B, C, E]`` and, if asked, the applied weights ``[B, heads, C, L]``.
    """
    device, given = memory.device.type, memory.dtype
    dtype = torch.promote_types(torch.promote_types(query.dtype, given), projections.in_weight.dtype)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        given = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
        dtype = given
    query, memory = query.to(dtype), memory.to(dtype)
    memory_pos = None if memory_pos is None else memory_pos.to(dtype).expand(memory.shape[0], -1, -1)
    projections = projections.to(dtype)
    seed = torch.randint(1 << 62, (1,), device=memory.device) if dropout > 0.0 else None
    run = _folded if form == "folded" else _plain
    scale = (memory.shape[2] // projections.num_heads) ** -0.5
    options = (key_padding_mask, seed, scale, dropout, need_weights, backend)
    context, weights = run(query, memory, projections, memory_pos, *options)
    return projections.out(context).to(given), weights.to(given) if need_weights else None


def _plain(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    padded: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    batch, length, width = memory.shape
    heads = projections.num_heads
    if padded is not None:  # the projections' gradients multiply what a padded position holds, NaN included, by 0
        memory = memory.masked_fill(padded[:, :, None], 0.0)
    keys = memory if memory_pos is None else memory + memory_pos
    q = F.linear(query, *projections.input(0)).unflatten(-1, (heads, -1))
    k = F.linear(keys, *projections.input(1)).view(batch, length, heads, -1)
    v = F.linear(memory, *projections.input(2)).view(batch, length, heads, -1)
    q = q[None] if query.dim() == 2 else q
    context, _, weights, _ = _run(q, k, v, None, padded, *options)
    return context.flatten(2), weights


def _folded(
    query: Tensor,
    memory: Tensor,
    projections: Projections,
    memory_pos: Tensor | None,
    padded: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    batch, _, width = memory.shape
    heads, classes = projections.num_heads, query.shape[-2]
    q = F.linear(query, *projections.input(0)).view(-1, heads, width // heads).transpose(0, 1)  # [H, (B) C, d]
    q = torch.bmm(q, projections.input(1)[0].view(heads, -1, width))  # the key weights, on the label side
    q = q.view(heads, -1, classes, width).permute(1, 2, 0, 3)  # [B or 1, C, H, E]
    gathered, mass, weights, _ = _run(q, memory[:, :, None], None, memory_pos, padded, *options)
    value_weight, value_bias = projections.input(2)
    per_head = gathered.view(batch * classes, heads, width).transpose(0, 1)
    context = torch.bmm(per_head, value_weight.view(heads, -1, width).transpose(1, 2))  # [H, B C, d]
    context = context.transpose(0, 1)
    if value_bias is not None:
        of_row = mass.transpose(1, 2).reshape(batch * classes, heads, 1)
        context = (context + of_row * value_bias.view(heads, -1)).to(memory.dtype)
    return context.reshape(batch, classes, width), weights


def _run(*given: Any) -> _core.Outputs:
    *fields, backend = given
    return _core.label_attention_core(_core.Inputs(*fields), backend)
