"""Op ``compact``: labels to class-major pairs by prefix sums, the count left on the device.

Small batches take one program that walks over the classes. Others take three launches: count a tile's actives, scan the
counts, scatter. Offsets are exclusive sums of integers, so the order is the specified one: class, then image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sadcl import _checks

from ._device import widen
from ._launch import ceil_div, launch

_SMALL_IMAGES, _SMALL_CLASSES = 256, 512  # where one program takes no longer than two more launches
_CHUNKS = 256  # the scan holds one count per chunk of images in registers


@triton.jit
def _read_labels(labels_ptr, offs_b, offs_c, mask, stride_lb, stride_lc):
    """Canonical target of a tile: 1 active, -1 ignored, 0 else."""
    offsets = offs_b.to(tl.int64)[:, None] * stride_lb + offs_c.to(tl.int64)[None, :] * stride_lc
    label = widen(tl.load(labels_ptr + offsets, mask=mask, other=0), tl.float32)  # [BLOCK_B, BLOCK_C]
    return tl.where(label == 1, 1, tl.where(label == -1, -1, 0))


@triton.jit(do_not_specialize=["B"])  # BLOCK_B follows it already
def _compact_small_kernel(
    labels_ptr,
    pairs_ptr,
    class_ptr_ptr,
    target_ptr,
    B,
    C,
    stride_lb,
    stride_lc,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_b = tl.arange(0, BLOCK_B)
    count = tl.zeros([], tl.int32)
    tl.store(class_ptr_ptr, 0)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = (offs_b < B)[:, None] & (offs_c < C)[None, :]
        pair = offs_b[:, None] * C + offs_c[None, :]
        target = _read_labels(labels_ptr, offs_b, offs_c, mask, stride_lb, stride_lc)
        tl.store(target_ptr + pair, target.to(tl.int8), mask=mask)
        active = (target == 1).to(tl.int32)
        in_class = tl.sum(active, axis=0)
        ends = count + tl.cumsum(in_class, axis=0)
        tl.store(class_ptr_ptr + 1 + offs_c, ends, mask=offs_c < C)
        slot = (ends - in_class)[None, :] + tl.cumsum(active, axis=0) - active
        tl.store(pairs_ptr + slot, pair, mask=active == 1)
        count += tl.sum(in_class)
    for start in range(0, B * C, BLOCK_B * BLOCK_C):
        offs = start + tl.arange(0, BLOCK_B * BLOCK_C)
        tl.store(pairs_ptr + offs, 0, mask=(offs >= count) & (offs < B * C))


@triton.jit
def _count_kernel(
    labels_ptr, target_ptr, counts_ptr, B, C, stride_lb, stride_lc, CHUNK, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    class_blocks = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // class_blocks
    offs_c = (tl.program_id(0) % class_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.int32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, B), BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & (offs_c < C)[None, :]
        target = _read_labels(labels_ptr, offs_b, offs_c, mask, stride_lb, stride_lc)
        pair = offs_b.to(tl.int64)[:, None] * C + offs_c[None, :]
        tl.store(target_ptr + pair, target.to(tl.int8), mask=mask)
        total += tl.sum((target == 1).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk.to(tl.int64) * C + offs_c, total, mask=offs_c < C)  # [chunks, C]


@triton.jit
def _scan_kernel(counts_ptr, class_ptr_ptr, C, CHUNKS, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: counts [chunks, C] become the first slot of each (chunk, class), in place."""
    offs_k = tl.arange(0, BLOCK_K)
    base = tl.zeros([], tl.int32)
    tl.store(class_ptr_ptr, 0)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = (offs_k < CHUNKS)[:, None] & (offs_c < C)[None, :]
        offsets = offs_k.to(tl.int64)[:, None] * C + offs_c[None, :]
        counts = tl.load(counts_ptr + offsets, mask=mask, other=0)  # [BLOCK_K, BLOCK_C]
        in_class = tl.sum(counts, axis=0)
        ends = base + tl.cumsum(in_class, axis=0)
        tl.store(class_ptr_ptr + 1 + offs_c, ends, mask=offs_c < C)
        first = (ends - in_class)[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(counts_ptr + offsets, first, mask=mask)
        base += tl.sum(in_class)


@triton.jit
def _scatter_kernel(
    target_ptr, first_ptr, class_ptr_ptr, pairs_ptr, B, C, CHUNK, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    class_blocks = tl.cdiv(C, BLOCK_C)
    chunk = tl.program_id(0) // class_blocks
    offs_c = (tl.program_id(0) % class_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(first_ptr + chunk.to(tl.int64) * C + offs_c, mask=offs_c < C, other=0)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, B), BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & (offs_c < C)[None, :]
        pair = offs_b.to(tl.int64)[:, None] * C + offs_c[None, :]
        target = tl.load(target_ptr + pair, mask=mask, other=0)  # [BLOCK_B, BLOCK_C]
        active = (target == 1).to(tl.int32)
        slot = first[None, :] + tl.cumsum(active, axis=0) - active
        tl.store(pairs_ptr + slot, pair.to(tl.int32), mask=active == 1)
        first += tl.sum(active, axis=0)
    # Every program clears its share of the slots behind the count.
    count = tl.load(class_ptr_ptr + C)
    STEP: tl.constexpr = BLOCK_B * BLOCK_C
    for start in range(tl.program_id(0) * STEP, B * C, tl.num_programs(0) * STEP):
        offs = start + tl.arange(0, STEP)
        tl.store(pairs_ptr + offs, 0, mask=(offs >= count) & (offs < B * C))


def compact(x: Any, out: Any) -> None:
    """Fill ``pairs``, ``class_ptr`` and ``target``, see :mod:`sadcl.ops.compact`."""
    labels = x.labels
    b, c = _checks.check_compactable(labels)
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    if b <= _SMALL_IMAGES and c <= _SMALL_CLASSES:
        block_b = max(16, triton.next_power_of_2(b))
        launch(_compact_small_kernel, 1, (labels, out.pairs, out.class_ptr, out.target, b, c, *labels.stride()),
               BLOCK_B=block_b, BLOCK_C=2048 // block_b, num_warps=8)  # fmt: skip
        return
    tile = {"BLOCK_B": 32, "BLOCK_C": 64}
    chunk = ceil_div(ceil_div(b, _CHUNKS), tile["BLOCK_B"]) * tile["BLOCK_B"]
    chunks = ceil_div(b, chunk)
    programs = chunks * ceil_div(c, tile["BLOCK_C"])
    counts = labels.new_empty((chunks, c), dtype=torch.int32)
    launch(_count_kernel, programs, (labels, out.target, counts, b, c, *labels.stride(), chunk), **tile)
    block_k = triton.next_power_of_2(chunks)
    launch(_scan_kernel, 1, (counts, out.class_ptr, c, chunks), BLOCK_K=block_k, BLOCK_C=max(16, 4096 // block_k),
           num_warps=8)  # fmt: skip
    launch(_scatter_kernel, programs, (out.target, counts, out.class_ptr, out.pairs, b, c, chunk), **tile)
