"""Op ``pscl``: prototype-to-sample contrastive loss; a block a class, one launch each way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._launch import Program, counters, launch
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
    _forward(x, out, ())


def pscl_mean(x: Any, out: Any, row_loss: Tensor, class_ptr: Tensor, means: tuple[Tensor, Tensor, Tensor]) -> None:
    """The same, and the means of op ``dual_mean``: SSCL's of ``row_loss [B, V, C]``, PSCL's, one over the rows."""
    ticket = counters(row_loss.device)[1:2]  # the first is SSCL's
    _forward(x, out, (class_ptr, row_loss, row_loss.shape[1], *means, ticket))


def _forward(x: Any, out: Any, means: tuple[Any, ...]) -> None:
    b, c, d = x.features.shape
    launch(
        _program("pscl_forward", x, bool(means), x.features, x.prototypes), grid=c, threads=512, shared=8 * 17,
        args=(x.features, x.prototypes, x.target.contiguous(), x.temperature, *out, b, c, d,
              (*x.features.stride(), *x.prototypes.stride()), *means),
    )  # fmt: skip


def pscl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features ``[B, C, D]``, prototypes ``[C, D]`` and temperature."""
    grad = upstream.grad_class_loss
    _backward(grad, grad.stride(0), x, saved, out, ())


def pscl_mean_backward(grad: Tensor | None, x: Any, saved: Any, out: Any, class_ptr: Tensor) -> None:
    """The same for the upstream gradient of the mean; the features' is added to what ``out`` holds, of any rows."""
    _backward(grad, 0, x, saved, out, (class_ptr, out.grad_features.stride()[:2]))


def _backward(grad: Tensor | None, stride: int, x: Any, saved: Any, out: Any, mean: tuple[Any, ...]) -> None:
    b, c, d = x.features.shape
    rows = (x.features, x.prototypes, out.grad_features, out.grad_prototypes)
    program = _program("pscl_backward", x, bool(mean), *rows)
    pack = int(str(program.defines["PACK"]))
    launch(
        program, grid=c * -(-d // (128 * pack)) + 1, threads=128, shared=8 * (4 + 2 * 128),
        args=(grad, stride, x.features, x.prototypes, x.target.contiguous(), x.temperature,
              saved.score, saved.norm_x, saved.norm_p, saved.lse, *out, b, c, d,
              (*x.features.stride(), *x.prototypes.stride()), *mean),
    )  # fmt: skip


def _program(kernel: str, x: Any, mean: bool, *rows: Tensor) -> Program:
    defines = {"FEATURES": type_of(x.features), "PACK": _pack_of(*rows), "RELEASED": int(x.released), "MEAN": int(mean)}
    return Program("pscl", kernel, defines)
