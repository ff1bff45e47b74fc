"""Op ``pscl``: prototype-to-sample contrastive loss; a block a class, one launch each way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._launch import Program, launch
from ._types import type_of

_PACK = 4


def _pack_of(*rows: Tensor) -> int:
    """How many elements are read at once: several where all rows are contiguous and begin at their multiples."""
    pack = 2 if rows[0].element_size() == 8 else _PACK
    size = pack * rows[0].element_size()
    fits = all(
        x.stride(-1) == 1
        and x.shape[-1] % pack == 0
        and all(step % pack == 0 for step in x.stride()[:-1])
        and x.storage_offset() % pack == 0
        and (x.is_meta or x.data_ptr() % size == 0)
        for x in rows
    )
    return pack if fits else 1


def pscl(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.pscl.Outputs`) from ``x`` (:class:`sadcl.ops.pscl.Inputs`)."""
    b, c, d = x.features.shape
    pack = _pack_of(x.features, x.prototypes)
    program = Program(
        "pscl", "pscl_forward", {"FEATURES": type_of(x.features), "PACK": pack, "RELEASED": int(x.released)}
    )
    launch(
        program, grid=c, threads=512, shared=8 * 16,
        args=(x.features, x.prototypes, x.target.contiguous(), x.temperature, *out, b, c, d,
              (*x.features.stride(), *x.prototypes.stride())),
    )  # fmt: skip


def pscl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features ``[B, C, D]``, prototypes ``[C, D]`` and temperature."""
    b, c, d = x.features.shape
    pack = _pack_of(x.features, x.prototypes, out.grad_features, out.grad_prototypes)
    program = Program(
        "pscl", "pscl_backward", {"FEATURES": type_of(x.features), "PACK": pack, "RELEASED": int(x.released)}
    )
    grad = upstream.grad_class_loss
    launch(
        program, grid=c * -(-d // (128 * pack)) + 1, threads=128, shared=8 * (4 + 2 * 128),
        args=(grad, grad.stride(0), x.features, x.prototypes, x.target.contiguous(), x.temperature,
              saved.score, saved.norm_x, saved.norm_p, saved.lse, *out, b, c, d,
              (*x.features.stride(), *x.prototypes.stride())),
    )  # fmt: skip
