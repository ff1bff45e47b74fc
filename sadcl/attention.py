"""Label attention: C label queries look at the L positions of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional.label_attention import FORMS, label_attention
from .linear import Linear


class PackedAttention(nn.Module):
    """The parameters of one attention block, named, packed and initialised as nn.MultiheadAttention's."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}, num_heads={num_heads}: expected a divisor")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform input projections and zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """Sizes shown by print()."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class LabelAttention(PackedAttention):
    """Multi-head cross attention from label queries to positions.

    The same function as ``nn.MultiheadAttention(embed_dim, num_heads, dropout, bias, batch_first=True)``
    called with ``query``, ``key=memory + memory_pos``, ``value=memory``; a state dict of either loads into
    the other. What differs: queries may be shared by the batch, positions need not be added beforehand, the
    weights come per head, and a fully padded image gives ``out_proj.bias`` instead of NaN. A flop count
    picks how it is computed (:func:`sadcl.functional.label_attention.forward_macs`).

    Args:
        embed_dim: E, width of queries, memory and output.
        num_heads: number of heads; divides E.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        form: ``"plain"`` or ``"folded"`` forces one way of computing it; None lets the flop count decide.
        backend: None for the best on the device, or a backend's name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        form: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias)
        if form is not None and form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)} or None, got {form!r}")
        self.form = form
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        memory_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the equations are in :func:`sadcl.reference.label_attention.label_attention`.

        Args:
            query: ``[C, E]``, the same for every image, or ``[B, C, E]``.
            memory: ``[B, L, E]`` positions of the feature map.
            memory_pos: ``[L, E]`` or ``[B, L, E]``, added to the keys and not to the values.
            key_padding_mask: bool ``[B, L]``, True where padded.
            need_weights: also return the weights (they are never made otherwise, where that can be avoided).

        Returns:
            out ``[B, C, E]`` and the weights as applied ``[B, heads, C, L]`` or None.

        Raises:
            ValueError: if shapes or devices do not fit together.
            TypeError: if a dtype is wrong.
        """
        wrapped = self._out_proj_is_more_than_its_weight()
        like = self.in_proj_weight
        out, weights = label_attention(
            query,
            memory,
            self.in_proj_weight,
            self.in_proj_bias,
            torch.eye(self.embed_dim, dtype=like.dtype, device=like.device) if wrapped else self.out_proj.weight,
            None if wrapped else self.out_proj.bias,
            self.num_heads,
            memory_pos=memory_pos,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            form=self.form,
            backend=self.backend,
        )
        return self.out_proj(out) if wrapped else out, weights

    def _out_proj_is_more_than_its_weight(self) -> bool:
        """Whether an adapter stands in its place, or a hook waits on it, which its weight alone would pass by."""
        proj = self.out_proj
        known = getattr(type(proj), "forward", None) in (Linear.forward, nn.Linear.forward)
        return not known or bool(proj._forward_hooks or proj._forward_pre_hooks)
