"""Label attention as a function, and the cost model that picks its form.

Backend ``cpp`` is one op (:mod:`sadcl.ops.label_attention`), ``triton`` torch's projections around another
(:mod:`sadcl.functional.label_attention_core`), ``torch`` no op but plain ATen
(:mod:`sadcl.portable.label_attention`), for other devices, export and second derivatives.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import by_name, makes_program, resolve
from .._checks import (
    check_choice,
    check_devices,
    check_floating,
    check_same_device,
    check_size,
    check_tensor,
    forward_mode,
)
from ..ops import label_attention as _label_attention
from ..ops.label_attention import FORMS
from ..portable import label_attention as portable
from ..reference.label_attention import label_attention as _reference
from . import label_attention_core as core

BACKENDS = ("cpp", "triton", "torch")


def _has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles (AMX): oneDNN does, behind torch, and our kernels not."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_bf16" in cpuinfo.read_text()


TORCH_HAS_TILES = _has_tiles()  # when this module loads: a call under torch.compile only reads it


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
        num_heads: > 0, divides E.
        memory_pos: ``[L, E]`` or ``[B, L, E]``, added to the keys only.
        key_padding_mask: bool ``[B, L]``, True where padded.
        dropout: probability in [0, 1) with which a weight is dropped (0 outside training).
        need_weights: also return the applied weights.
        form: ``"plain"``, ``"folded"`` or None for :func:`choose_form`.
        backend: None for the best on the device, or a backend's name. A CPU that multiplies bfloat16 (AVX512_BF16) does
            so for None: what one product hands the next is rounded to it, as torch's is. ``"cpp"`` keeps float32.

    Returns:
        out ``[B, C, E]`` and, if asked, the weights as applied (after dropout) ``[B, heads, C, L]``.

    Raises:
        ValueError: if shapes or devices do not fit together, or a choice is none of those.
        TypeError: if a dtype is wrong.
        RuntimeError: if the backend asked for cannot run.
    """
    width = _check_parameters(in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    _check_inputs(width, query, memory, memory_pos, key_padding_mask)
    check_devices(
        memory=memory,
        in_proj_weight=in_proj_weight,
        in_proj_bias=in_proj_bias,
        out_proj_weight=out_proj_weight,
        out_proj_bias=out_proj_bias,
    )
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of E={width}, got {num_heads}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
    if form is not None:
        check_choice("form", form, FORMS)
    if backend is None and (makes_program() or forward_mode()):
        backend = "torch"
    chosen = resolve(backend, "label_attention", memory.device, BACKENDS)
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
    batch, length, _ = memory.shape
    if form is None:
        # A program for any batch size must not compare it with anything: its form is that for one image.
        known = batch if type(batch) is int and not makes_program() else 1
        form = choose_form(known, query.shape[-2], length, width, num_heads, query.dim() == 2)
    arguments = (query, memory, projections, memory_pos, key_padding_mask, dropout, need_weights, form)
    if chosen == "torch":
        return portable.attend(*arguments)
    if chosen == "triton":
        return core.attend(*arguments, chosen)
    named = by_name(backend)
    if TORCH_HAS_TILES and not named and all(t.dtype == torch.bfloat16 for t in (query, memory, in_proj_weight)):
        return portable.attend(*arguments)
    return _fused(*arguments, not named, chosen)


def _check_parameters(
    in_proj_weight: Tensor, in_proj_bias: Tensor | None, out_proj_weight: Tensor, out_proj_bias: Tensor | None
) -> int:
    """E, by which all of them must go."""
    check_tensor("in_proj_weight", in_proj_weight, (2,), "[3E, E]")
    width = in_proj_weight.shape[1]
    for name, value, layout, shape in (
        ("in_proj_weight", in_proj_weight, "[3E, E]", (3 * width, width)),
        ("in_proj_bias", in_proj_bias, "[3E]", (3 * width,)),
        ("out_proj_weight", out_proj_weight, "[E, E]", (width, width)),
        ("out_proj_bias", out_proj_bias, "[E]", (width,)),
    ):
        if value is None:
            continue
        check_floating(name, check_tensor(name, value, (len(shape),), layout))
        if value.shape != shape:
            raise ValueError(f"{name}: expected {layout} with E={width} (from in_proj_weight), got {list(value.shape)}")
    return width


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


def _fused(
    query: Tensor,
    memory: Tensor,
    projections: portable.Projections,
    memory_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    need_weights: bool,
    form: str,
    rounded: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The op, and what surrounds it: the dropout mask out of torch's generator, and the result's dtype."""
    batch, length, _ = memory.shape
    classes, heads = query.shape[-2], projections.num_heads
    survivors = None
    if dropout > 0.0:
        survivors = torch.rand((batch, length, heads * classes), device=memory.device) >= dropout
    inputs = _label_attention.Inputs(
        query=query,
        memory=memory,
        in_weight=projections.in_weight,
        in_bias=projections.in_bias,
        out_weight=projections.out_weight,
        out_bias=projections.out_bias,
        memory_pos=None if memory_pos is None else memory_pos.expand(batch, -1, -1),
        padded=None if key_padding_mask is None else key_padding_mask.contiguous(),
        survivors=survivors,
        heads=heads,
        folded=form == "folded",
        keep_scale=1.0 / (1.0 - dropout),
        rounded=rounded,
    )
    out, weights, *_ = _label_attention.label_attention(inputs, backend)
    # Inside, sums and what autocast would narrow are float32 (float64); outside, the dtype is what torch's would be.
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
