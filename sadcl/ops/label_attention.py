"""Op ``label_attention``: the whole attention block with its projections, in two exact forms.

*plain*: project keys and values of all B L positions, then attend. *folded*: with C < L it is cheaper to move the
projections to the label side::

    q_bch . (W_k,h (m_bl + pos_l) + b_k,h) = (W_k,h^T q_bch) . (m_bl + pos_l) + const    (softmax drops it)
    sum_l a_bhcl (W_v,h m_bl + b_v,h)      = W_v,h (sum_l a_bhcl m_bl) + b_v,h sum_l a_bhcl

Folded queries that the batch shares are made once a batch. The forward saves what the backward would otherwise
compute again: the weights ``[B, L, heads * C]`` (heads C / E of the memory's size), projected queries, the form's keys
and values, the context. C++ only: on a GPU the projections stay torch's and :mod:`sadcl.ops.label_attention_core` is
what lies between them; elsewhere it is plain ATen (:mod:`sadcl.portable.label_attention`).
Oracle: :func:`sadcl.reference.label_attention.label_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._library import Backward, Into, Op
from ._native import native

FORMS = ("plain", "folded")


class Inputs(NamedTuple):
    """What attends, to what, by which weights. E = heads * d; Q = 1 if the batch shares its queries, else B."""

    query: Tensor  # [C, E] or [B, C, E]
    memory: Tensor  # [B, L, E]
    in_weight: Tensor  # [3E, E]
    in_bias: Tensor | None  # [3E]
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None  # [E]
    memory_pos: Tensor | None  # [B, L, E]
    padded: Tensor | None  # bool [B, L]
    survivors: Tensor | None  # bool [B, L, heads * C]: what dropout leaves
    heads: int
    folded: bool
    keep_scale: float  # what dropout multiplies its survivors by
    rounded: bool = False  # whether bfloat16 products, where the processor has them, may round what they are given


class Outputs(NamedTuple):
    """The result and the applied weights, then what the backward reads; all in the accumulation dtype."""

    out: Tensor  # [B, C, E]
    weights: Tensor  # [B, L, heads * C], after dropout
    soft: Tensor  # the same before dropout, or [0] without it
    mass: Tensor  # [heads, B, C], sums of `weights` over positions
    q: Tensor  # [Q, C, E] projected queries
    keys: Tensor  # folded: [Q, heads, C, E] queries times key weights; plain: [B, L, E] projected keys
    values: Tensor  # folded: [B, heads, C, E] weighted memory; plain: [B, L, E] projected values
    context: Tensor  # [B, C, E]


class Gradients(NamedTuple):
    """What the backward fills: weights' in their own dtype, the others in the accumulation dtype."""

    grad_query: Tensor | None
    grad_memory: Tensor | None
    grad_in_weight: Tensor | None
    grad_in_bias: Tensor | None
    grad_out_weight: Tensor | None
    grad_out_bias: Tensor | None
    grad_memory_pos: Tensor | None


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    batch, length, width = x.memory.shape
    classes = x.query.shape[-2]
    queries = 1 if x.query.dim() == 2 else batch
    weights = (batch, length, x.heads * classes)
    shapes: dict[str, tuple[int, ...]] = {
        "out": (batch, classes, width),
        "weights": weights,
        "soft": (0,) if x.survivors is None else weights,
        "mass": (x.heads, batch, classes),
        "q": (queries, classes, width),
        "keys": (queries, x.heads, classes, width) if x.folded else (batch, length, width),
        "values": (batch, x.heads, classes, width) if x.folded else (batch, length, width),
        "context": (batch, classes, width),
    }
    dtype = accumulation_dtype(x.memory.dtype)
    return Outputs(**{name: x.memory.new_empty(shape, dtype=dtype) for name, shape in shapes.items()})


def _allocate_gradients(x: Inputs, wanted: tuple[str, ...]) -> Gradients:
    dtype = accumulation_dtype(x.memory.dtype)
    grads: dict[str, Tensor | None] = {}
    for name in BACKWARD.gradients:
        like = x.memory if name == "memory_pos" else getattr(x, name)
        # Those of the input projection come together.
        asked = name in wanted or (name.startswith("in_") and not {"in_weight", "in_bias"}.isdisjoint(wanted))
        if name == "in_bias" and asked:
            like = x.in_weight[:, 0]
        kept = like.dtype if name.endswith("_weight") else dtype
        grads[f"grad_{name}"] = like.new_empty(like.shape, dtype=kept) if asked else None
    return Gradients(**grads)


def _backward_cpp(upstream: Any, x: Inputs, saved: Outputs, out: Gradients) -> None:
    if upstream.grad_weights is not None:
        upstream = upstream._replace(grad_weights=upstream.grad_weights.contiguous())
    native("label_attention_backward")(upstream, x, saved, out)
    if out.grad_out_bias is not None:
        torch.sum(upstream.grad_out, (0, 1), out=out.grad_out_bias)


def _spread(grads: Gradients, x: Inputs) -> dict[str, Tensor | None]:
    return {
        name: grad.to(getattr(x, name.removeprefix("grad_")).dtype)
        for name, grad in zip(grads._fields, grads, strict=True)
        if grad is not None and getattr(x, name.removeprefix("grad_")) is not None
    }


BACKWARD = Backward(
    gradients=tuple(name.removeprefix("grad_") for name in Gradients._fields),
    implementations={"cpp": Into(_backward_cpp)},
    needs=(*Inputs._fields, *(name for name in Outputs._fields if name != "out")),
    fills=Gradients,
    allocate=_allocate_gradients,
    spread=_spread,
    instead="backend='reference' (or backend='torch' with form='folded')",
)
label_attention = Op(
    "label_attention",
    Inputs,
    Outputs,
    allocate,
    {"cpp": Into(native("label_attention_forward"))},
    BACKWARD,
    results=2,
)
