"""Label attention as written: the oracle that every faster form is held against."""

from __future__ import annotations

import torch
from torch import Tensor


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
    dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head cross attention from C label queries to the L positions of a feature map.

    With ``W_q, W_k, W_v`` (and ``b_q, b_k, b_v``) the thirds of the packed input projection, d = E / heads
    and head h owning the columns ``h*d .. (h+1)*d``::

        q_bc = W_q query_bc + b_q      k_bl = W_k (memory_bl + pos_l) + b_k      v_bl = W_v memory_bl + b_v
        a_bhcl  = softmax over l of  q_bch . k_blh / sqrt(d)
        ctx_bch = sum over l of  a_bhcl v_blh
        out_bc  = W_o concat_h(ctx_bch) + b_o

    Positions reach the keys only. True in ``key_padding_mask`` means padded: that position takes no part,
    whatever it holds (NaN included), and receives gradient 0. In a fully padded image all weights are 0 (no
    softmax of nothing), the context is 0, so ``out = b_o``, and nothing but ``b_o`` receives gradient.
    Dropout replaces ``a`` by ``a * dropped`` (entries 0 or 1/(1-p)): the value bias then enters times the
    row sum of the dropped weights.

    Args:
        query: ``[C, E]`` (shared by the batch) or ``[B, C, E]``.
        memory: ``[B, L, E]``.
        in_proj_weight: ``[3E, E]``.
        in_proj_bias: ``[3E]`` or None.
        out_proj_weight: ``[E, E]``.
        out_proj_bias: ``[E]`` or None.
        num_heads: divides E.
        memory_pos: ``[L, E]`` or ``[B, L, E]``.
        key_padding_mask: bool ``[B, L]``.
        dropped: multiplier ``[B, heads, C, L]`` of the weights.

    Returns:
        out ``[B, C, E]`` and the applied weights ``[B, heads, C, L]``.
    """
    batch, length, width = memory.shape
    query = query.expand(batch, -1, -1)
    pad = torch.zeros(batch, length, dtype=torch.bool, device=memory.device)
    if key_padding_mask is not None:
        pad = key_padding_mask
    memory = torch.where(pad[:, :, None], 0.0, memory)
    keys = memory if memory_pos is None else memory + memory_pos
    projections = in_proj_weight.view(3, num_heads, width // num_heads, width)
    q = torch.einsum("bce,hde->bhcd", query, projections[0])
    k = torch.einsum("ble,hde->bhld", keys, projections[1])
    v = torch.einsum("ble,hde->bhld", memory, projections[2])
    if in_proj_bias is not None:
        biases = in_proj_bias.view(3, num_heads, 1, width // num_heads)
        q, k, v = q + biases[0], k + biases[1], v + biases[2]
    scores = torch.einsum("bhcd,bhld->bhcl", q, k) / (width // num_heads) ** 0.5
    empty = pad.all(1)
    hidden = pad & ~empty[:, None]  # a row of -inf alone is NaN; the fully padded image is zeroed after
    weights = scores.masked_fill(hidden[:, None, None, :], float("-inf")).softmax(-1)
    weights = weights.masked_fill(empty[:, None, None, None], 0.0)
    if dropped is not None:
        weights = weights * dropped
    context = torch.einsum("bhcl,bhld->bchd", weights, v).flatten(2)
    out = torch.einsum("bce,fe->bcf", context, out_proj_weight)
    return out if out_proj_bias is None else out + out_proj_bias, weights
