"""Op ``pscl``: prototype-to-sample contrastive loss.

Forward: scores of all (image, class), one read of the features; then two log-sum-exps per class. Backward: one program
owns a class and a slice of the width and walks over the images, so the prototype's gradient needs no atomics; the
features are read once and no product of features with prototypes is made again. Scores, norms and log-sum-exps are
float64 (see the op): that is a few float64 operations an element, under the time its bytes take on A100 and H100.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sadcl._dtypes import accumulation_dtype

from ._device import narrow, online_step, power_of_two_scale, reciprocal, widen
from ._launch import ceil_div, launch, part_of, require_dtype
from ._log_sums import log_of

_BLOCK_BATCH = 128  # images a step of the per-class reduction


@triton.jit
def _score_kernel(
    x_ptr,
    p_ptr,
    temperature_ptr,
    score_ptr,
    norm_x_ptr,
    norm_p_ptr,
    B,
    C,
    D,
    strides,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_B images of one class."""
    stride_xb, stride_xc, stride_xd, stride_pc, stride_pd = strides
    c = (tl.program_id(0) % C).to(tl.int64)
    block = tl.program_id(0) // C
    offs_b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    row = offs_b.to(tl.int64) * stride_xb + c * stride_xc
    xx = tl.zeros([BLOCK_B, BLOCK_D], tl.float64)
    xp = tl.zeros([BLOCK_B, BLOCK_D], tl.float64)
    pp = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < D
        p = tl.load(p_ptr + c * stride_pc + offs_d * stride_pd, mask=mask_d, other=0)  # [BLOCK_D]
        x = tl.load(
            x_ptr + row[:, None] + offs_d[None, :] * stride_xd, mask=mask_b[:, None] & mask_d[None, :], other=0
        )  # [BLOCK_B, BLOCK_D]
        x, p = widen(x, tl.float64), widen(p, tl.float64)
        xx += x * x
        xp += x * p[None, :]
        pp += p * p
    norm_x = tl.sqrt(tl.sum(xx, axis=1))
    norm_p = tl.sqrt(tl.sum(pp, axis=0))
    # A zero vector's products are 0 already (or NaN where the other side is).
    cosine = tl.sum(xp, axis=1) / tl.where(norm_x == 0, 1.0, norm_x) / tl.where(norm_p == 0, 1.0, norm_p)
    score = cosine / tl.load(temperature_ptr).to(tl.float64)
    out = offs_b.to(tl.int64) * C + c
    tl.store(score_ptr + out, score, mask=mask_b)
    tl.store(norm_x_ptr + out, norm_x, mask=mask_b)
    tl.store(norm_p_ptr + c, norm_p, mask=block == 0)


@triton.jit(do_not_specialize=["B"])  # BLOCK_B follows it already
def _class_kernel(
    score_ptr, target_ptr, loss_ptr, lse_ptr, B, C, RELEASED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    high_all = tl.full([BLOCK_C], float("-inf"), tl.float64)
    high_pos = tl.full([BLOCK_C], float("-inf"), tl.float64)
    sum_all = tl.zeros([BLOCK_C], tl.float64)
    sum_pos = tl.zeros([BLOCK_C], tl.float64)
    positives = tl.zeros([BLOCK_C], tl.int32)
    valid = tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_c[None, :]
        offsets = offs_b.to(tl.int64)[:, None] * C + offs_c[None, :]
        target = tl.load(target_ptr + offsets, mask=mask, other=-1)  # [BLOCK_B, BLOCK_C]
        score = tl.load(score_ptr + offsets, mask=mask, other=0)
        valid_score = tl.where(target != -1, score, float("-inf"))
        high_all, sum_all = online_step(high_all, sum_all, valid_score, 0, False)
        positive_score = tl.where(target == 1, score, float("-inf"))
        high_pos, sum_pos = online_step(high_pos, sum_pos, positive_score, 0, False)
        positives += tl.sum((target == 1).to(tl.int32), axis=0)
        valid += tl.sum((target != -1).to(tl.int32), axis=0)
    lse_all = log_of(high_all, sum_all)
    lse_pos = log_of(high_pos, sum_pos)
    # NaN in a valid row is the class's loss, whether or not it has a positive.
    loss = tl.where((positives > 0) | (lse_all != lse_all), lse_all - lse_pos, 0.0)
    if RELEASED:
        loss = tl.where((positives == 0) & (valid > 0), lse_all - high_all, loss)
    tl.store(loss_ptr + offs_c, loss.to(loss_ptr.dtype.element_ty), mask=mask_c)
    tl.store(lse_ptr + offs_c, lse_all, mask=mask_c)  # [2, C]
    tl.store(lse_ptr + C + offs_c, lse_pos, mask=mask_c)


@triton.jit
def _gradient_kernel(
    upstream_ptr,
    x_ptr,
    p_ptr,
    target_ptr,
    temperature_ptr,
    stats,
    grad_x_ptr,
    grad_p_ptr,
    partial_ptr,
    sizes,
    strides,
    RELEASED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one class, BLOCK_D of its width, all images."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    B, C, D = sizes
    score_ptr, norm_x_ptr, norm_p_ptr, lse_ptr = stats
    stride_g, stride_xb, stride_xc, stride_xd, stride_pc, stride_pd = strides
    c = (tl.program_id(0) % C).to(tl.int64)
    block = tl.program_id(0) // C
    offs_d = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    temperature = tl.load(temperature_ptr).to(tl.float64)
    upstream = tl.load(upstream_ptr + c * stride_g).to(tl.float64)
    lse_all, lse_pos = tl.load(lse_ptr + c), tl.load(lse_ptr + C + c)
    if not RELEASED:
        upstream = tl.where(lse_pos == float("-inf"), 0.0, upstream)

    norm_p = tl.load(norm_p_ptr + c)
    scale_p = power_of_two_scale(norm_p)
    over_p = reciprocal(norm_p, scale_p).to(ACC)
    p = tl.load(p_ptr + c * stride_pc + offs_d * stride_pd, mask=mask_d, other=0)  # [BLOCK_D]
    u = widen(p, ACC) * scale_p * over_p
    grad_p = tl.zeros([BLOCK_D], ACC)
    radial = tl.zeros([BLOCK_B], tl.float64)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = offs_b < B
        element = offs_b.to(tl.int64) * C + c
        target = tl.load(target_ptr + element, mask=mask_b, other=-1)  # [BLOCK_B]
        # What an ignored place holds is never read: NaN times 0 is no gradient.
        valid = target != -1
        score = tl.load(score_ptr + element, mask=valid, other=0)
        norm_x = tl.load(norm_x_ptr + element, mask=valid, other=0)
        # dL/ds = G (softmax over the valid images - softmax over the positive ones)
        grad = tl.where(valid, tl.exp(score - lse_all), 0.0)
        grad = upstream * (grad - tl.where(target == 1, tl.exp(score - lse_pos), 0.0))
        radial += tl.where(valid, grad * score, 0.0)
        grad = (grad / temperature).to(ACC)[:, None]
        cosine = (score * temperature).to(ACC)[:, None]
        scale_x = power_of_two_scale(norm_x)
        over_x = reciprocal(norm_x, scale_x).to(ACC)
        mask = mask_b[:, None] & mask_d[None, :]
        offsets = (offs_b.to(tl.int64) * stride_xb + c * stride_xc)[:, None] + offs_d[None, :] * stride_xd
        x = tl.load(x_ptr + offsets, mask=mask & valid[:, None], other=0)  # [BLOCK_B, BLOCK_D]
        z = widen(x, ACC) * scale_x[:, None] * over_x[:, None]
        # The tangential part over |x|, by its two factors: their product may leave the range.
        grad_x = tl.where(valid[:, None], grad * (u[None, :] - cosine * z), 0.0) * over_x[:, None] * scale_x[:, None]
        grad_x = tl.where((norm_x == 0)[:, None], 0.0, grad_x)
        tl.store(
            grad_x_ptr + element[:, None] * D + offs_d[None, :], narrow(grad_x, grad_x_ptr.dtype.element_ty), mask=mask
        )
        grad_p += tl.sum(tl.where(valid[:, None], grad * (z - cosine * u[None, :]), 0.0), axis=0)
    grad_p = tl.where(norm_p == 0, 0.0, grad_p * over_p * scale_p)
    tl.store(grad_p_ptr + c * D + offs_d, narrow(grad_p, grad_p_ptr.dtype.element_ty), mask=mask_d)
    tl.store(partial_ptr + c, tl.sum(radial).to(ACC), mask=block == 0)  # [C]


@triton.jit
def _temperature_kernel(partial_ptr, temperature_ptr, out_ptr, C, BLOCK: tl.constexpr):
    """``-1/tau`` times the sum of the classes' ``dL/ds . s``, in one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, C, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < C, other=0).to(tl.float64)
    tl.store(out_ptr, (-tl.sum(total) / tl.load(temperature_ptr).to(tl.float64)).to(out_ptr.dtype.element_ty))


def pscl(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.pscl.Outputs`) from ``x`` (:class:`sadcl.ops.pscl.Inputs`)."""
    b, c, d = x.features.shape
    require_dtype(part_of(x.features.device), x.features.dtype)
    strides = (*x.features.stride(), *x.prototypes.stride())
    # 4 x 256: two float64 accumulators an element are 32 registers a thread.
    launch(
        _score_kernel,
        c * ceil_div(b, 4),
        (x.features, x.prototypes, x.temperature, out.score, out.norm_x, out.norm_p, b, c, d, strides),
        BLOCK_B=4, BLOCK_D=min(256, max(16, triton.next_power_of_2(d))),
    )  # fmt: skip
    launch(_class_kernel, ceil_div(c, 16), (out.score, x.target.contiguous(), out.class_loss, out.lse, b, c),
           RELEASED=x.released, BLOCK_B=min(_BLOCK_BATCH, max(16, triton.next_power_of_2(b))), BLOCK_C=16)  # fmt: skip


def pscl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features ``[B, C, D]``, prototypes ``[C, D]`` and temperature."""
    b, c, d = x.features.shape
    grad = upstream.grad_class_loss
    partial = x.features.new_empty(c, dtype=accumulation_dtype(x.features.dtype))
    # 128 of the width: 640 programs at C=80, D=1024.
    block_d = min(128, max(16, triton.next_power_of_2(d)))
    launch(
        _gradient_kernel,
        c * ceil_div(d, block_d),
        (grad, x.features, x.prototypes, x.target.contiguous(), x.temperature,
         (saved.score, saved.norm_x, saved.norm_p, saved.lse),
         out.grad_features, out.grad_prototypes, partial, (b, c, d),
         (grad.stride(0), *x.features.stride(), *x.prototypes.stride())),
        RELEASED=x.released, BLOCK_B=16, BLOCK_D=block_d,
    )  # fmt: skip
    launch(_temperature_kernel, 1, (partial, x.temperature, out.grad_temperature, c), BLOCK=1024)
