"""Op ``label_attention_core``: label attention between its projections, for GPUs.

Scores, softmax, dropout and the weighted sum, of ``query [B or 1, C, H, D]`` with ``keys [B, L, groups, D]``::

    s_bhcl = scale query_bch . (keys_bl,g + pos_bl)          g = h (groups = H) or 0 (groups = 1, the folded form)
    a_bhcl = softmax over unpadded l of s_bhcl, 0 in a fully padded image, times dropout's 0 or 1 / (1 - rate)
    context_bch = sum_l a_bhcl values_bl,g        mass_bhc = sum_l a_bhcl

``values=None`` means the keys without positions (folded). Dropout draws from Philox with the 1-element int64 ``seed``,
at offset ``((b H + h) C + c) L + l``: the same weights fall in forward, backward and both forms, nothing is stored.
Oracle: :func:`sadcl.reference.label_attention.label_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._dtypes import accumulation_dtype
from ._library import Backward, Into, Op
from ._native import triton_kernel


class Inputs(NamedTuple):
    """What attends, and to what."""

    query: Tensor  # [B or 1, C, H, D]
    keys: Tensor  # [B, L, groups, D]
    values: Tensor | None  # [B, L, groups, D]
    pos: Tensor | None  # [B, L, D]
    padded: Tensor | None  # bool [B, L]
    seed: Tensor | None  # int64 [1], with dropout
    scale: float
    dropout: float
    need_weights: bool


class Outputs(NamedTuple):
    """The results, then what else the backward reads."""

    context: Tensor  # [B, C, H, D]
    mass: Tensor  # accumulation dtype [B, H, C]
    weights: Tensor  # accumulation dtype [B, H, C, L], or [0] unless asked for
    lse: Tensor  # accumulation dtype [2, B, H, C], base 2: the highest score, log-sum over it (+inf: all is padded)


class Gradients(NamedTuple):
    """What the backward fills: the keys' gradient is the positions' too."""

    query: Tensor | None
    keys: Tensor | None
    values: Tensor | None


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    _, c, h, d = x.query.shape
    b, length = x.keys.shape[:2]
    acc = accumulation_dtype(x.query.dtype)
    return Outputs(
        context=x.query.new_empty((b, c, h, d)),
        mass=x.query.new_empty((b, h, c), dtype=acc),
        weights=x.query.new_empty((b, h, c, length) if x.need_weights else (0,), dtype=acc),
        lse=x.query.new_empty((2, b, h, c), dtype=acc),
    )


def _allocate_gradients(x: Inputs, wanted: tuple[str, ...]) -> Gradients:
    # Keys that are values too get one gradient, unless positions want the keys' part of it.
    for_keys = "keys" in wanted or "pos" in wanted
    for_values = "values" in wanted or (x.values is None and "pos" in wanted)
    return Gradients(
        query=x.query.new_empty(x.query.shape) if "query" in wanted else None,
        keys=x.keys.new_empty(x.keys.shape) if for_keys else None,
        values=x.keys.new_empty(x.keys.shape) if for_values else None,
    )


def _spread(grads: Gradients, x: Inputs) -> dict[str, Tensor | None]:
    both = pos = grads.keys
    if pos is not None:
        both = pos + grads.values if x.values is None and grads.values is not None else pos
        pos = pos.squeeze(2) if x.pos is not None else None
    return {"grad_query": grads.query, "grad_keys": both, "grad_values": grads.values, "grad_pos": pos}


_BACKWARD = "label_attention_core_backward"
label_attention_core = Op(
    "label_attention_core",
    Inputs,
    Outputs,
    allocate,
    {"triton": Into(triton_kernel("label_attention_core", "label_attention_core"))},
    Backward(
        gradients=("query", "keys", "values", "pos"),
        implementations={"triton": Into(triton_kernel(_BACKWARD, _BACKWARD))},
        needs=(*Inputs._fields, *Outputs._fields),
        fills=Gradients,
        allocate=_allocate_gradients,
        spread=_spread,
    ),
    results=3,
)
