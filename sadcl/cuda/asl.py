"""Op ``asl``: asymmetric loss and its derivative; a block an image."""

from __future__ import annotations

import math
from typing import Any

from sadcl import _checks

from ._launch import Program, launch
from ._types import type_of


def asl(x: Any, out: Any) -> None:
    """Fill loss (one number where there is room for one) and derivative (with ``save``), see :mod:`sadcl.ops.asl`."""
    if _checks.reads_values(x.labels):
        _checks.check_soft_labels(x.labels)
    b, c = x.logits.shape
    weight = None if x.class_weight is None else x.class_weight.to(out.loss.dtype)
    summed = int(x.sum_classes) if out.loss.dim() > 0 else 2
    program = Program(
        "asl",
        "asl_forward",
        {
            "LOGITS": type_of(x.logits),
            "LABELS": type_of(x.labels),
            "WEIGHTED": int(weight is not None),
            "CLIP": int(x.clip != 0),
            "SAVE": int(x.save),
            "SUM": summed,
        },
    )
    strides = (*x.logits.stride(), *x.labels.stride(), 0 if weight is None else weight.stride(0))
    constants = (float(x.gamma_neg), float(x.gamma_pos), float(x.clip), math.log(x.eps), int(x.detach_focal_weight))
    slope = out.slope if x.save else None
    launch(
        program, grid=1 if summed == 2 else b, threads=1024 if summed == 2 else 128, shared=8 * 32,
        args=(x.logits, x.labels, weight, out.loss, slope, b, c, strides, *constants),
    )  # fmt: skip


def asl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits: upstream (``[]``, ``[B]`` or ``[B, C]``) times the derivative."""
    grad, (_, c) = upstream.grad_loss, saved.slope.shape
    strides = (*grad.stride(), 0, 0)[:2]
    count = saved.slope.numel()
    launch(
        Program("asl", "asl_backward", {"LOGITS": type_of(x.logits)}), grid=-(-count // 256), threads=256,
        args=(grad, saved.slope, out.grad_logits, c, count, strides),
    )  # fmt: skip
