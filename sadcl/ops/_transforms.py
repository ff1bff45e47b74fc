"""Who watches an op run, and ops under torch.func: grad, vjp, jacrev, vmap; forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list}


def watched(*args: Any) -> bool:
    """Whether somebody watches what runs: a compiler or tracer, a dispatch mode (fake tensors), torch.func."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, args))
    )


def refuse_forward_mode(name: str, instead: str) -> Callable[..., Any]:
    """What stands for the op's ``jvp``."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"sadcl::{name}: forward-mode derivatives (jvp, jacfwd, hessian, forward_ad) are not implemented; "
            f"use reverse mode (grad, vjp, jacrev), or {instead}"
        )

    return refuse


def transformable(
    name: str,
    run: Callable[..., Any],
    derive: Callable[..., Any] | None,
    prepare: Callable[..., None] | None,
    instead: str,
) -> Callable[..., Any]:
    """``run`` as an autograd.Function that torch.func can transform.

    The one that eager mode uses takes its context in ``forward``: torch.func refuses that, and this one costs 0.1 ms
    more a call. Under vmap an op runs once an entry of the batch.
    """

    function: Any

    def no_derivative(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"sadcl::{name} has no derivative")

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        rows = [
            function.apply(*(x.select(at, i) if type(at) is int else x for x, at in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])

    methods = {
        "forward": staticmethod(run),
        "setup_context": staticmethod(prepare or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(derive or no_derivative),
        "jvp": staticmethod(refuse_forward_mode(name, instead)),
        "vmap": staticmethod(one_by_one),
    }
    function = type(f"sadcl_{name}_transformed", (torch.autograd.Function,), methods)
    return function.apply
