"""The label transformer: post-norm encoder, decoder without self-attention, sine positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import LabelAttention, PackedAttention
from .functional.linear import linear
from .linear import Linear

_CACHED_SIZES = 8


def position_sine(
    width: int,
    size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sine positions of an H x W map.

    Rows and columns are counted from 1 and scaled to ``a = 2 pi i / (H + 1e-6)`` (columns with W). Feature
    j of the first half is ``sin`` (j even) or ``cos`` (j odd) of ``a_row / 10000^(2 floor(j/2) /
    (width/2))``; the second half is the same of the column.

    Args:
        width: E, divisible by 4.
        size: (H, W).
        device: where to put it.
        dtype: of the result; computed in float32.

    Returns:
        ``[H*W, E]``, row-major over the map.
    """
    if width % 4:
        raise ValueError(f"width: sine positions need a multiple of 4, got {width}")
    half = width // 2
    pair = torch.arange(half // 2, device=device, dtype=torch.float32)
    frequency = torch.pow(10000.0, 2 * pair / half)  # [half / 2]

    def axis(steps: int) -> Tensor:
        counted = torch.arange(1, steps + 1, device=device, dtype=torch.float32)
        angle = (counted / (steps + 1e-6) * (2 * math.pi))[:, None] / frequency
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # [steps, half]

    height, breadth = size
    rows = axis(height)[:, None].expand(-1, breadth, -1)
    columns = axis(breadth)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(dtype)


class PositionSine(nn.Module):
    """Positions of the usual map size as a buffer; those of other sizes are made once and kept.

    Args:
        width: E.
        size: the usual (H, W).
    """

    position: Tensor

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.width = width
        self.size = size
        self.register_buffer("position", position_sine(width, size), persistent=False)
        self._cache: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Positions ``[H*W, E]`` for a map of ``size``."""
        if size == self.size:
            return self.position
        device, dtype = self.position.device, self.position.dtype
        if torch.compiler.is_compiling():  # a traced program must not fill a Python dict
            return position_sine(self.width, size, device=device, dtype=dtype)
        key = (*size, device, dtype)
        if key not in self._cache:
            if len(self._cache) == _CACHED_SIZES:
                self._cache.clear()
            with torch.inference_mode(False):  # an inference tensor could not serve a later training step
                self._cache[key] = position_sine(self.width, size, device=device, dtype=dtype)
        return self._cache[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionSine:
        """Move or cast, then compute anew: to_empty() leaves garbage, and a cast to half and back rounds."""
        super()._apply(fn, recurse)
        self._cache.clear()
        if not self.position.is_meta:
            device, dtype = self.position.device, self.position.dtype
            self.position = position_sine(self.width, self.size, device=device, dtype=dtype)
        return self


class SelfAttention(PackedAttention):
    """Self-attention with ``q = k = x + pos`` and ``v = x``."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """Attend.

        Args:
            x: ``[B, L, E]``.
            pos: ``[L, E]``.

        Returns:
            ``[B, L, E]``.
        """
        batch, length, width = x.shape
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        # W (x + pos) = W x + W pos: the second term once a batch, and one product for q, k and v.
        moved = linear(pos, self.in_proj_weight[: 2 * width])
        q, k = (qkv[..., : 2 * width] + moved).view(batch, length, 2, self.num_heads, -1).unbind(2)
        v = qkv[..., 2 * width :].reshape(batch, length, self.num_heads, -1)
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(context.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """``W_2 drop(relu(W_1 x + b_1)) + b_2``."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = Linear(width, inner)
        self.linear2 = Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class EncoderLayer(nn.Module):
    """Post-norm: ``x = norm1(x + attention(x))``, ``x = norm2(x + ffn(x))``."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads, dropout)
        self.ffn = FeedForward(width, ffn_dim, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """Encode ``[B, L, E]`` with positions ``[L, E]``."""
        x = self.norm1(x + self.dropout(self.self_attn(x, pos)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class DecoderLayer(nn.Module):
    """Cross attention and feed-forward, post-norm; labels never look at each other.

    ``t = norm1(t + attention(t + query, memory))``, ``t = norm2(t + ffn(t))``.
    """

    def __init__(self, width: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = LabelAttention(width, num_heads, dropout)
        self.ffn = FeedForward(width, ffn_dim, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, target: Tensor | None, query: Tensor, memory: Tensor, pos: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Decode.

        Args:
            target: ``[B, C, E]``, or None in the first layer, where it is 0: its queries are then one set
            for the
                whole batch, which the attention makes use of.
            query: ``[C, E]`` label queries.
            memory: ``[B, L, E]``.
            pos: ``[L, E]``.
            need_weights: also return the attention weights.

        Returns:
            ``[B, C, E]`` and ``[B, heads, C, L]`` or None.
        """
        asked = query if target is None else target + query
        attended, weights = self.cross_attn(asked, memory, pos, need_weights=need_weights)
        attended = self.dropout(attended)
        target = self.norm1(attended if target is None else target + attended)
        return self.norm2(target + self.dropout(self.ffn(target))), weights
