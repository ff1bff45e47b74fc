"""Op ``label_attention_core``: label attention between its projections, for GPUs, and the block around it.

The projections are dense products and stay torch's (cuBLAS), with torch's autograd, under torch's autocast. What is
fused is the rest: scores, softmax, dropout and the weighted sum, of ``query [B or 1, C, H, D]`` with
``keys [B, L, groups, D]``::

    s_bhcl = scale query_bch . (keys_bl,g + pos_bl)          g = h (groups = H) or 0 (groups = 1, the folded form)
    a_bhcl = softmax over unpadded l of s_bhcl, 0 in a fully padded image, times dropout's 0 or 1 / (1 - rate)
    context_bch = sum_l a_bhcl values_bl,g        mass_bhc = sum_l a_bhcl

``values=None`` means the keys without positions (folded). ``lse [B, H, C]`` is the log-sum-exp to base 2, ``+inf`` in a
fully padded image. Dropout draws from Philox with the 1-element int64 ``seed``, at offset ``((b H + h) C + c) L + l``:
the same weights fall in forward, backward and both forms, and nothing is stored. Weights are ``[0]`` unless asked for.
Oracle: :func:`sadcl.reference.label_attention.label_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..portable.label_attention import Projections
from ._library import call, refuse_second_derivative, register, register_autograd, triton_kernel

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    pos: Tensor | None,
    padded: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    need_weights: bool,
    backend: str,
) -> Outputs:
    _, c, h, d = query.shape
    b, length = keys.shape[:2]
    acc = accumulation_dtype(query.dtype)
    return (
        query.new_empty((b, c, h, d)),
        query.new_empty((b, h, c), dtype=acc),
        query.new_empty((b, h, c, length) if need_weights else (0,), dtype=acc),
        query.new_empty((b, h, c), dtype=acc),
    )


def _backward_fake(
    grad_context: Tensor, grad_mass: Tensor | None, grad_weights: Tensor | None, query: Tensor, keys: Tensor, *rest: Any
) -> Gradients:
    for_query, for_keys, for_values = rest[-2]
    return (
        query.new_empty(query.shape if for_query else (0,)),
        keys.new_empty(keys.shape if for_keys else (0,)),
        keys.new_empty(keys.shape if for_values else (0,)),
    )


register(
    "label_attention_core",
    "(Tensor query, Tensor keys, Tensor? values, Tensor? pos, Tensor? padded, Tensor? seed, float scale,"
    " float dropout, bool need_weights, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    {"triton": triton_kernel("label_attention_core", "label_attention_core")},
    _fake,
)
register(
    "label_attention_core_backward",
    "(Tensor grad_context, Tensor? grad_mass, Tensor? grad_weights, Tensor query, Tensor keys, Tensor? values,"
    " Tensor? pos, Tensor? padded, Tensor? seed, Tensor context, Tensor mass, Tensor weights, Tensor lse, float scale,"
    " float dropout, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    {"triton": triton_kernel("label_attention_core_backward", "label_attention_core_backward")},
    _backward_fake,
)
refuse_second_derivative("label_attention_core_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, ctx.scale, ctx.dropout, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[3])


def _autograd(
    ctx: Any, grad_context: Tensor | None, grad_mass: Tensor | None, grad_weights: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    values, context, weights = ctx.saved_tensors[2], ctx.saved_tensors[6], ctx.saved_tensors[8]
    for_query, for_keys, for_values, for_pos = ctx.needs_input_grad[:4]
    if grad_context is None:
        grad_context = torch.zeros_like(context)
    if weights.numel() == 0:
        grad_weights = None
    # Keys that are values too get one gradient, unless positions want the keys' part of it.
    apart = values is None and for_pos
    grad_query, grad_keys, grad_values = call(
        "label_attention_core_backward",
        grad_context, grad_mass, grad_weights, *ctx.saved_tensors, ctx.scale, ctx.dropout,
        [for_query, for_keys or for_pos, for_values or apart], ctx.backend,
    )  # fmt: skip
    grad_pos = grad_keys if for_pos else None
    return (
        grad_query if for_query else None,
        (grad_keys + grad_values if apart else grad_keys) if for_keys else None,
        grad_values if for_values else None,
        grad_pos.squeeze(2) if grad_pos is not None else None,
        None, None, None, None, None, None,
    )  # fmt: skip


register_autograd("label_attention_core", _autograd, _setup_context)


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
    context, _, weights, _ = call("label_attention_core", q, k, v, None, padded, *options)
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
    gathered, mass, weights, _ = call("label_attention_core", q, memory[:, :, None], None, memory_pos, padded, *options)
    value_weight, value_bias = projections.input(2)
    per_head = gathered.view(batch * classes, heads, width).transpose(0, 1)
    context = torch.bmm(per_head, value_weight.view(heads, -1, width).transpose(1, 2))  # [H, B C, d]
    context = context.transpose(0, 1)
    if value_bias is not None:
        of_row = mass.transpose(1, 2).reshape(batch * classes, heads, 1)
        context = (context + of_row * value_bias.view(heads, -1)).to(memory.dtype)
    return context.reshape(batch, classes, width), weights
