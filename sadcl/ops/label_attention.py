"""Op ``label_attention``: the whole attention block with its projections, in two exact forms, and the cost model.

*plain*: project keys and values of all B L positions, then attend. *folded*: with C < L it is cheaper to move the
projections to the label side::

    q_bch . (W_k,h (m_bl + pos_l) + b_k,h) = (W_k,h^T q_bch) . (m_bl + pos_l) + const    (softmax drops it)
    sum_l a_bhcl (W_v,h m_bl + b_v,h)      = W_v,h (sum_l a_bhcl m_bl) + b_v,h sum_l a_bhcl

Folded queries that the batch shares are made once a batch. The forward saves what the backward would otherwise
compute again: the weights ``[B, L, heads * C]`` (heads C / E of the memory's size), projected queries, the form's keys
and values, the context. Backend ``triton`` keeps torch's projections and fuses what lies between them
(:mod:`sadcl.ops.label_attention_core`). Backend ``torch`` is no op but plain ATen
(:mod:`sadcl.portable.label_attention`), for other devices, export and second derivatives.
Oracle: :func:`sadcl.reference.label_attention.label_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import resolve
from .._checks import check_floating, check_same_device, check_size, check_tensor
from .._dtypes import accumulation_dtype
from ..portable import label_attention as portable
from ..reference.label_attention import label_attention as _reference
from . import label_attention_core as core
from ._library import array, call, extension, implemented, refuse_second_derivative, register, register_autograd

FORMS = ("plain", "folded")
SAVED = ("weights", "soft", "mass", "q", "keys", "values", "context")

Outputs = tuple[Tensor, ...]


def _allocate(query: Tensor, memory: Tensor, kept: Tensor | None, heads: int, folded: bool) -> dict[str, Tensor]:
    """Uninitialised results by name; csrc/label_attention.h says what they are."""
    batch, length, width = memory.shape
    classes = query.shape[-2]
    queries = 1 if query.dim() == 2 else batch
    weights = (batch, length, heads * classes)
    shapes: dict[str, tuple[int, ...]] = {
        "out": (batch, classes, width),
        "weights": weights,
        "soft": (0,) if kept is None else weights,
        "mass": (heads, batch, classes),
        "q": (queries, classes, width),
        "keys": (queries, heads, classes, width) if folded else (batch, length, width),
        "values": (batch, heads, classes, width) if folded else (batch, length, width),
        "context": (batch, classes, width),
    }
    dtype = accumulation_dtype(memory.dtype)
    return {name: memory.new_empty(shape, dtype=dtype) for name, shape in shapes.items()}


def _fake(
    query: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    memory_pos: Tensor | None,
    padded: Tensor | None,
    kept: Tensor | None,
    heads: int,
    folded: bool,
    keep_scale: float,
    backend: str,
) -> Outputs:
    return tuple(_allocate(query, memory, kept, heads, folded).values())


def _cpp(
    query: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    memory_pos: Tensor | None,
    padded: Tensor | None,
    kept: Tensor | None,
    heads: int,
    folded: bool,
    keep_scale: float,
) -> Outputs:
    results = _allocate(query, memory, kept, heads, folded)
    tensors = {
        "query": query, "memory": memory, "in_weight": in_weight, "in_bias": in_bias, "out_weight": out_weight,
        "out_bias": out_bias, "memory_pos": memory_pos, "padded": padded, "kept": kept, **results,
    }  # fmt: skip
    extension().label_attention_forward(_arrays(tensors), heads, folded, keep_scale, torch.get_num_threads())
    return tuple(results.values())


def _arrays(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else array(tensor) for name, tensor in tensors.items()}


def _allocate_gradients(query: Tensor, memory: Tensor, in_weight: Tensor, wanted: list[bool]) -> dict[str, Tensor]:
    """Uninitialised gradients by name; empty where nobody asks."""
    width = memory.shape[-1]
    for_query, for_memory, for_input, for_output, for_pos = wanted
    shapes = {
        "grad_query": (for_query, query.shape),
        "grad_memory": (for_memory, memory.shape),
        "grad_in_weight": (for_input, (3 * width, width)),
        "grad_in_bias": (for_input, (3 * width,)),
        "grad_out_weight": (for_output, (width, width)),
        "grad_pos": (for_pos, memory.shape),
    }
    dtype = accumulation_dtype(memory.dtype)
    return {name: memory.new_empty(shape if asked else (0,), dtype=dtype) for name, (asked, shape) in shapes.items()}


def _backward_fake(
    grad_out: Tensor, grad_weights: Tensor | None, query: Tensor, memory: Tensor, in_weight: Tensor, *rest: Any
) -> Outputs:
    *_, wanted, _ = rest
    return tuple(_allocate_gradients(query, memory, in_weight, wanted).values())


def _backward_cpp(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    memory_pos: Tensor | None,
    padded: Tensor | None,
    kept: Tensor | None,
    *rest: Any,
) -> Outputs:
    *saved, heads, folded, keep_scale, wanted = rest
    gradients = _allocate_gradients(query, memory, in_weight, wanted)
    asked = {name: gradient if gradient.numel() else None for name, gradient in gradients.items()}
    tensors = {
        "query": query, "memory": memory, "in_weight": in_weight, "in_bias": in_bias, "out_weight": out_weight,
        "out_bias": None, "memory_pos": memory_pos, "padded": padded, "kept": kept, "grad_out": grad_out,
        "grad_weights": None if grad_weights is None else grad_weights.contiguous(),
        **dict(zip(SAVED, saved, strict=True)), **asked,
    }  # fmt: skip
    extension().label_attention_backward(_arrays(tensors), heads, folded, keep_scale, torch.get_num_threads())
    return tuple(gradients.values())


_IMPLEMENTATIONS = {"cpp": _cpp}
IMPLEMENTED = (*implemented(_IMPLEMENTATIONS), "triton", "torch")

register(
    "label_attention",
    "(Tensor query, Tensor memory, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias,"
    " Tensor? memory_pos, Tensor? padded, Tensor? kept, int heads, bool folded, float keep_scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _IMPLEMENTATIONS,
    _fake,
)
register(
    "label_attention_backward",
    "(Tensor grad_out, Tensor? grad_weights, Tensor query, Tensor memory, Tensor in_weight, Tensor? in_bias,"
    " Tensor out_weight, Tensor? memory_pos, Tensor? padded, Tensor? kept, Tensor weights, Tensor soft, Tensor mass,"
    " Tensor q, Tensor keys, Tensor values, Tensor context, int heads, bool folded, float keep_scale, bool[] wanted,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpp": _backward_cpp},
    _backward_fake,
)
refuse_second_derivative("label_attention_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, memory, in_weight, in_bias, out_weight, out_bias, memory_pos, padded, kept, *ctx.constants = inputs
    ctx.save_for_backward(query, memory, in_weight, in_bias, out_weight, memory_pos, padded, kept, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.out_bias_dtype = None if out_bias is None else out_bias.dtype


def _autograd(ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    query, memory, in_weight, in_bias, out_weight, memory_pos, *_ = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(memory.shape[0], query.shape[-2], memory.shape[2])
        grad_out = grad_out.to(accumulation_dtype(memory.dtype))
    wanted = [needs[0], needs[1], needs[2] or needs[3], needs[4], needs[6]]
    heads, folded, keep_scale, backend = ctx.constants
    gradients = call(
        "label_attention_backward",
        grad_out, grad_weights, *ctx.saved_tensors, heads, folded, keep_scale, wanted, backend,
    )  # fmt: skip
    d_query, d_memory, d_in_weight, d_in_bias, d_out_weight, d_pos = gradients
    d_out_bias = grad_out.sum((0, 1)).to(ctx.out_bias_dtype) if needs[5] else None

    def give(index: int, gradient: Tensor, like: Tensor | None) -> Tensor | None:
        return gradient.to(like.dtype) if needs[index] and like is not None else None

    return (
        give(0, d_query, query), give(1, d_memory, memory), give(2, d_in_weight, in_weight),
        give(3, d_in_bias, in_bias), give(4, d_out_weight, out_weight), d_out_bias, give(6, d_pos, memory_pos),
        None, None, None, None, None, None,
    )  # fmt: skip


register_autograd("label_attention", _autograd, _setup_context)


def _fused(
    query: Tensor,
    memory: Tensor,
    projections: portable.Projections,
    memory_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    need_weights: bool,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The op, and what surrounds it: the dropout mask out of torch's generator, and the result's dtype."""
    batch, length, _ = memory.shape
    classes, heads = query.shape[-2], projections.num_heads
    kept = None
    if dropout > 0.0:
        kept = torch.rand((batch, length, heads * classes), device=memory.device) >= dropout
    out, weights, *_ = call(
        "label_attention",
        query, memory, projections.in_weight, projections.in_bias, projections.out_weight, projections.out_bias,
        None if memory_pos is None else memory_pos.expand(batch, -1, -1),
        None if key_padding_mask is None else key_padding_mask.contiguous(),
        kept, heads, form == "folded", 1.0 / (1.0 - dropout), backend,
    )  # fmt: skip
    # Inside, the arithmetic is float32 (float64) whatever autocast says; outside, the dtype is what torch's would be.
    device = memory.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else memory.dtype
    if memory.dtype == torch.float64:
        dtype = memory.dtype
    if not need_weights:
        return out.to(dtype), None
    return out.to(dtype), weights.view(batch, length, heads, classes).permute(0, 2, 3, 1).to(dtype)


def forward_macs(form: str, batch: int, classes: int, length: int, width: int, num_heads: int, shared: bool) -> int:
    """Multiply-accumulates of one forward.

    ======================  ======================  ==============================
    step                    plain                   folded
    ======================  ======================  ==============================
    query projection        Q C E^2                 Q C E^2
    keys | folded queries   B L E^2                 Q C E^2
    values                  B L E^2                 B C E^2
    scores                  B C L E                 B H C L E
    weighting               B C L E                 B H C L E
    output projection       B C E^2                 B C E^2
    ======================  ======================  ==============================

    Q is 1 for shared queries and B otherwise. Folding pays roughly while C < L and H L < E. The softmax and the
    additions of positions are left out: they are the same or small.

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
    attended = 2 * batch * num_heads * classes * length * width
    return ends + queries * classes * square + batch * classes * square + attended


def backward_macs(form: str, batch: int, classes: int, length: int, width: int, num_heads: int, shared: bool) -> int:
    """Multiply-accumulates of one backward for all inputs: every product of the forward has two gradients of its size.

    Nothing is computed again, since the forward saves the weights and both forms' intermediate results.
    """
    return 2 * forward_macs(form, batch, classes, length, width, num_heads, shared)


def choose_form(batch: int, classes: int, length: int, width: int, num_heads: int, shared: bool) -> str:
    """The form with fewer multiply-accumulates, forward and backward together (plain on a tie)."""
    sizes = (batch, classes, length, width, num_heads, shared)
    plain, folded = (forward_macs(form, *sizes) + backward_macs(form, *sizes) for form in FORMS)
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
    chosen = resolve(backend, "label_attention", memory.device, IMPLEMENTED)
    if chosen == "reference":
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
    projections = portable.Projections(in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads)
    batch, length, width = memory.shape
    if form is None:
        form = choose_form(batch, query.shape[-2], length, width, num_heads, query.dim() == 2)
    arguments = (query, memory, projections, memory_pos, key_padding_mask, dropout, need_weights, form)
    if chosen == "torch":
        return portable.attend(*arguments)
    return core.attend(*arguments, chosen) if chosen == "triton" else _fused(*arguments, chosen)


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
