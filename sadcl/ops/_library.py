"""The torch.library namespace of sadcl: an op is declared once, from what goes in and what comes out.

:func:`declare` takes two NamedTuples. Their fields' names and types are the op's schema; its fakes, what is saved for
the backward, the op ``<name>_backward`` and the order of every argument follow from them. Implementations never see an
order: they get the tuples and use field names, and so do the bindings of the extension (:mod:`sadcl.ops._native`).
"""

from __future__ import annotations

import functools
import itertools
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._checks import forward_mode
from .._dtypes import without_autocast
from ._native import resolved
from ._pick import compiled, row, several
from ._transforms import refuse_forward_mode, transformable, watched

LIBRARY = torch.library.Library("sadcl", "DEF")

# Best first; resolve() takes the first that runs on the tensors' device.
PREFERENCE = ("cpp", "triton", "cuda", "torch")

_TENSORS = (Tensor, Optional[Tensor])  # noqa: UP045 (as get_type_hints spells it)
_SCHEMA = {Tensor: "Tensor", _TENSORS[1]: "Tensor?", bool: "bool", int: "SymInt", float: "float", str: "str"}
_SCHEMA[Optional[int]] = "SymInt?"  # noqa: UP045

_EAGER: dict[str, Callable[..., Any]] = {}
_STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {}
_TRANSFORMED: dict[str, Callable[..., Any]] = {}
OPS: dict[str, Op] = {}

INSTEAD = "backend='reference'"


@dataclass(frozen=True)
class Into:
    """An implementation that fills tensors allocated for it: ``run(inputs, outputs)``.

    A backward is ``run(upstream, inputs, saved, gradients)``; a gradient that nobody wants may be None.
    """

    run: Callable[..., Any]


Implementation = Callable[..., Any] | Into


@dataclass(frozen=True)
class Backward:
    """The first derivative of an op.

    Attributes:
        gradients: the inputs that have one.
        implementations: one a backend: ``(upstream, inputs, saved, wanted) -> mapping of grad_<input>``, or an
            :class:`Into`. ``upstream`` has a field ``grad_<result>`` for each result: of the first always a tensor, of
            the others None where nobody used them. ``wanted`` are the inputs whose gradient is asked for.
        needs: inputs and outputs that it reads; the others are not saved, and None there. Default: all inputs, and all
            outputs but the results.
        partial: whether an :class:`Into` can leave out gradients that nobody wants.
        fills: NamedTuple of what the implementations give, where that is not one ``grad_<input>`` an input.
        allocate: ``(inputs, wanted) -> fills``, uninitialised; None for what is not made. Default: as the inputs are.
        spread: ``(fills, inputs) -> mapping of grad_<input>``, where there is a ``fills``.
        plain: ``(upstream, inputs) -> mapping of grad_<input>`` in torch's own operators, which is run where a graph of
            the derivative is wanted; without it second derivatives are refused.
        instead: what errors advise who wants second or forward-mode derivatives.
    """

    gradients: tuple[str, ...]
    implementations: Mapping[str, Implementation]
    needs: tuple[str, ...] | None = None
    partial: bool = False
    fills: Any = None
    allocate: Callable[[Any, tuple[str, ...]], Any] | None = None
    spread: Callable[[Any, Any], Mapping[str, Tensor | None]] | None = None
    plain: Callable[[Any, Any], Mapping[str, Tensor | None]] | None = None
    instead: str = INSTEAD


@dataclass(frozen=True)
class Op:
    """A declared op: ``op(inputs, backend)`` gives its outputs.

    Attributes:
        name: ``sadcl::<name>``; with a backward there is ``sadcl::<name>_backward`` too.
        inputs: NamedTuple of what goes in: tensors, optional ones, bools, ints (symbolic when compiled), floats, strs.
        outputs: NamedTuple of tensors: the results first, then what only the backward needs.
        allocate: ``inputs -> outputs``, uninitialised: the fake, and what an :class:`Into` fills.
        implementations: one a backend: ``inputs -> outputs`` or a mapping of their fields, or an :class:`Into`.
        backward: the first derivative, or None.
        results: how many outputs can be differentiated.
        mutates: an input that is written in place.
        backends: the backends that have an implementation, best first.
        derivative: what was made of ``backward``.
        runs: ``inputs -> outputs``, one a backend.
    """

    name: str
    inputs: Any
    outputs: Any
    allocate: Callable[[Any], Any]
    implementations: Mapping[str, Implementation]
    backward: Backward | None = None
    results: int = 1
    mutates: str | None = None
    backends: tuple[str, ...] = field(init=False)
    derivative: _Derivative | None = field(init=False, default=None)
    runs: dict[str, Callable[[Any], Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", tuple(name for name in PREFERENCE if name in self.implementations))
        types = get_type_hints(self.inputs)
        schema = [f"{_SCHEMA[types[name]]} {name}" for name in self.inputs._fields]
        if self.mutates is not None:
            schema[self.inputs._fields.index(self.mutates)] = f"Tensor(a!) {self.mutates}"
        runs = {name: self._run(implementation) for name, implementation in self.implementations.items()}
        object.__setattr__(self, "runs", runs)
        _register(self.name, schema, len(self.outputs._fields), self.inputs, runs, self.allocate)
        if self.backward is not None:
            object.__setattr__(self, "derivative", _Derivative(self, self.backward, types))
        OPS[self.name] = self

    def __call__(self, inputs: Any, backend: str) -> Any:
        """Run the implementation ``backend``, which resolve() has found able to run."""
        return self.outputs(*several(call(self.name, *inputs, backend)))

    def run(self, x: Any, backend: str) -> Any:
        """Outputs by one implementation, past the dispatcher and autograd."""
        return self.runs[backend](x)

    def _run(self, implementation: Implementation) -> Callable[[Any], Any]:
        allocate, outputs = self.allocate, self.outputs
        if isinstance(implementation, Into):
            fill = implementation.run

            def filled(x: Any) -> Any:
                out = allocate(x)
                fill(x, out)
                return out

            return filled

        def made(x: Any) -> Any:
            given = implementation(x)
            return outputs(**given) if isinstance(given, Mapping) else given

        return made


class _Derivative:
    """Op ``<name>_backward`` of an op, and the autograd between the two.

    Its arguments: upstream gradients, the inputs and outputs that it needs, which gradients are wanted, backend.
    """

    def __init__(self, op: Op, backward: Backward, types: dict[str, Any]) -> None:
        self.op, self.backward = op, backward
        inputs, outputs = op.inputs._fields, op.outputs._fields
        needs = (*inputs, *outputs[op.results :]) if backward.needs is None else backward.needs
        x_at = [i for i, name in enumerate(inputs) if name in needs]
        out_at = [i for i, name in enumerate(outputs) if name in needs]
        tensors = [i for i in x_at if types[inputs[i]] in _TENSORS]
        constants = [i for i in x_at if i not in tensors]
        # What is saved is a row of tensors, t, and a row of constants, c.
        x_from = {inputs[i]: f"t[{k}]" for k, i in enumerate(tensors)}
        x_from |= {inputs[i]: f"c[{k}]" for k, i in enumerate(constants)}
        out_from = {outputs[i]: f"t[{len(tensors) + k}]" for k, i in enumerate(out_at)}
        self.tensors_of = compiled("x, out", [f"x[{i}]" for i in tensors] + [f"out[{i}]" for i in out_at])
        self.constants_of = compiled("x", [f"x[{i}]" for i in constants])
        self.inputs_of = compiled("t, c", [x_from.get(name, "None") for name in inputs], op.inputs)
        self.saved_of = compiled("t", [out_from.get(name, "None") for name in outputs], op.outputs)
        # The backward op's arguments of both, and back.
        self.flat = compiled("t, c", [x_from[inputs[i]] for i in x_at] + [out_from[outputs[i]] for i in out_at])
        count = op.results + len(x_at)
        where = {i: op.results + k for k, i in enumerate(x_at)}
        self.split = compiled(
            "a",
            [
                row([f"a[{where[i]}]" for i in tensors] + [f"a[{count + k}]" for k in range(len(out_at))]),
                row([f"a[{where[i]}]" for i in constants]),
            ],
        )
        self.gradient_at = [inputs.index(name) for name in backward.gradients]
        self.none = (None,) * (len(inputs) + 1)
        self.wanted: dict[tuple[bool, ...], tuple[str, ...]] = {}
        upstream = [f"grad_{name}" for name in outputs[: op.results]]
        self.upstream: Any = namedtuple("upstream", upstream)  # type: ignore[misc]
        grads = namedtuple("grads", [f"grad_{name}" for name in backward.gradients])  # type: ignore[misc]
        self.fills: Any = backward.fills or grads
        self.schema = [f"Tensor {upstream[0]}", *(f"Tensor? {name}" for name in upstream[1:])]
        self.schema += [f"{_SCHEMA[types[inputs[i]]]} {inputs[i]}" for i in x_at]
        self.schema += [f"Tensor {outputs[i]}" for i in out_at]
        self.schema += ["bool[] wanted"]
        self.arguments: Any = namedtuple("arguments", [part.split()[1] for part in self.schema])  # type: ignore[misc]
        self._register()

    def _register(self) -> None:
        """Define the op, its fake, the first derivative, and the refusal of the second."""
        name = f"{self.op.name}_backward"
        runs = {key: functools.partial(self.run, backend=key) for key in self.backward.implementations}
        _register(name, self.schema, len(self.fills._fields), self.arguments, runs, self.fake)

        def refuse(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(
                f"sadcl::{name}: second derivatives are not implemented by the fused kernels; "
                f"{self.backward.instead} is differentiable twice"
            )

        _register_autograd(name, refuse, lambda ctx, given, output: None, self.backward.instead)
        _register_autograd(self.op.name, self.derive, self.setup_context, self.backward.instead)

    def unpack(self, given: Any) -> tuple[Any, Any, Any, tuple[str, ...]]:
        """Arguments as (upstream, inputs, saved outputs, wanted)."""
        tensors, constants = self.split(given)
        upstream = self.upstream(*given[: self.op.results])
        return upstream, self.inputs_of(tensors, constants), self.saved_of(tensors), self.names_of(tuple(given[-1]))

    def names_of(self, asked: tuple[bool, ...]) -> tuple[str, ...]:
        """The inputs of which a gradient is asked for."""
        if asked not in self.wanted:
            self.wanted[asked] = tuple(itertools.compress(self.backward.gradients, asked))
        return self.wanted[asked]

    def allocate(self, x: Any, wanted: tuple[str, ...]) -> Any:
        """Uninitialised gradients, None for those that are not made."""
        if self.backward.allocate is not None:
            return self.backward.allocate(x, wanted)
        made = []
        for name in self.backward.gradients:
            like = getattr(x, name)
            left_out = like is None or (self.backward.partial and name not in wanted)
            made.append(None if left_out else like.new_empty(like.shape))
        return self.fills(*made)

    def pack(self, upstream: tuple[Tensor | None, ...], x: Any, out: Any, wanted: tuple[str, ...] | None = None) -> Any:
        """The backward op's arguments, but for the backend; ``wanted`` None: all gradients of inputs that are there."""
        asked = [getattr(x, name) is not None if wanted is None else name in wanted for name in self.backward.gradients]
        return self.arguments(*upstream, *self.flat(self.tensors_of(x, out), self.constants_of(x)), asked)

    def grads(self, upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...], backend: str) -> Any:
        """What one backend's implementation gives; None for what it left out."""
        implementation = self.backward.implementations[backend]
        if isinstance(implementation, Into):
            grads = self.allocate(x, wanted)
            implementation.run(upstream, x, saved, grads)
            return grads
        got = implementation(upstream, x, saved, wanted)
        return self.fills(*(got.get(name) for name in self.fills._fields)) if isinstance(got, Mapping) else got

    def run(self, given: Any, backend: str) -> tuple[Tensor, ...]:
        """The same of the op's arguments; what was left out is a tensor of no elements."""
        return self._complete(self.grads(*self.unpack(given), backend), given)

    def fake(self, given: Any) -> tuple[Tensor, ...]:
        """Shapes and dtypes of :meth:`run`'s results."""
        _, x, _, wanted = self.unpack(given)
        return self._complete(self.allocate(x, wanted), given)

    @staticmethod
    def _complete(grads: Any, given: Any) -> tuple[Tensor, ...]:
        return tuple(given[0].new_empty(0) if grad is None else grad for grad in grads)

    def setup_context(self, ctx: Any, given: tuple[Any, ...], output: Any) -> None:
        """Save what the backward needs."""
        made = several(output)
        ctx.mark_non_differentiable(*made[self.op.results :])
        ctx.save_for_backward(*self.tensors_of(given, made))
        ctx.constants = self.constants_of(given)
        ctx.backend = given[-1]
        ctx.first = None if self.op.results == 1 else (made[0].shape, made[0].dtype, made[0].device)

    def derive(self, ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        """Run the backward, as the op where somebody watches, and hand each gradient to its input."""
        needed = ctx.needs_input_grad
        asked = tuple(needed[i] for i in self.gradient_at)
        if True not in asked:
            return self.none
        upstream = upstream[: self.op.results]
        if upstream[0] is None:
            shape, dtype, device = ctx.first
            upstream = (torch.zeros(shape, dtype=dtype, device=device), *upstream[1:])
        tensors, constants, backend = ctx.saved_tensors, ctx.constants, ctx.backend  # read once, for checkpointing
        x = self.inputs_of(tensors, constants)
        if self.backward.plain is not None and torch.is_grad_enabled():
            by_name = self.backward.plain(self.upstream(*upstream), x)
            answer = list(self.none)
            for i, name, wanted in zip(self.gradient_at, self.backward.gradients, asked, strict=True):
                answer[i] = by_name[f"grad_{name}"] if wanted else None
            return tuple(answer)
        if torch.is_grad_enabled() or watched(*upstream, *tensors) or upstream[0].is_meta:
            arguments = (*upstream, *self.flat(tensors, constants), list(asked), backend)
            got = several(call(f"{self.op.name}_backward", *arguments))
            grads = self.fills(*(None if grad.shape == (0,) else grad for grad in got))
        else:
            above = resolved(self.op.name, self.upstream(*upstream))
            grads = _quietly(backend, self.grads, above, x, self.saved_of(tensors), self.names_of(asked), backend)
        answer = list(self.none)
        if self.backward.spread is not None:
            by_name = self.backward.spread(grads, x)
            grads = [by_name.get(f"grad_{name}") for name in self.backward.gradients]
        for i, wanted, grad in zip(self.gradient_at, asked, grads, strict=True):
            answer[i] = grad if wanted else None
        return tuple(answer)


def _quietly(backend: str, run: Callable[..., Any], x: Any, *rest: Any) -> Any:
    """Without autocast, which is still on inside an op's implementation and would round torch's float32 products."""
    if backend != "torch":
        return run(x, *rest)
    with without_autocast(x[0].device):
        return run(x, *rest)


def call(name: str, *args: Any) -> Any:
    """Run ``sadcl::name``: through torch's dispatcher where somebody watches, else straight to the kernel.

    Who watches: a compiler or tracer, a dispatch mode, a tensor subclass, meta tensors. For everybody else the way
    through the dispatcher and torch.library's wrappers is 0.1 ms a call, more than a small loss takes.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.sadcl, name)(*args)
    if args[0].is_meta or watched(*args):
        if torch._C._are_functorch_transforms_active() and not is_in_torch_dispatch_mode():
            return _TRANSFORMED[name](*args)
        return getattr(torch.ops.sadcl, name)(*args)
    # Forward-mode tangents are there without grad mode, too: they must be refused, not lost.
    return (_DIFFERENTIABLE if torch.is_grad_enabled() or forward_mode() else _EAGER)[name](*args)


def _register(
    name: str,
    schema: list[str],
    returns: int,
    inputs: Any,
    implementations: Mapping[str, Callable[[Any], Any]],
    fake: Callable[[Any], Any],
) -> None:
    """Define ``sadcl::name`` whose last argument, ``str backend``, picks among ``implementations`` of ``inputs``."""

    def plain(made: Any) -> Any:  # as torch.library wants it: nothing, one tensor, or a tuple
        return (None if returns == 0 else made[0]) if returns < 2 else tuple(made)

    def given(args: tuple[Any, ...]) -> Any:
        return resolved(name, inputs(*args[:-1]))

    def execute(x: Any, backend: str) -> Any:
        return plain(_quietly(backend, implementations[backend], x))

    def run(*args: Any) -> Any:
        return execute(given(args), args[-1])

    LIBRARY.define(f"{name}({', '.join([*schema, 'str backend'])}) -> ({', '.join(['Tensor'] * returns)})")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sadcl::{name}", lambda *args: plain(fake(inputs(*args[:-1]))), lib=LIBRARY)
    _EAGER[name] = _DIFFERENTIABLE[name] = run
    _STEPS[name] = given, execute
    _TRANSFORMED[name] = transformable(name, run, None, None, INSTEAD)


def _register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None], instead: str
) -> None:
    """Attach the first derivative ``backward(ctx, *grads)``; the gradient of an output that nobody used is None."""

    def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # else zeros would be made in place of the saved statistics' gradients
        setup_context(ctx, inputs, output)

    def derive(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    torch.library.register_autograd(f"sadcl::{name}", derive, setup_context=prepare, lib=LIBRARY)
    run, (given, execute) = _EAGER[name], _STEPS[name]

    def forward(ctx: Any, *args: Any) -> Any:  # torch inspects the signature at every call of one without ctx: 0.1 ms
        x = given(args)
        output = execute(x, args[-1])
        prepare(ctx, (*x, args[-1]), output)  # what was made real stays so for the backward
        return output

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(derive),
        "jvp": staticmethod(refuse_forward_mode(name, instead)),
    }
    function: Any = type(f"sadcl_{name}", (torch.autograd.Function,), methods)
    # Function.apply looks for torch.func, which call() has done, and unwraps what it left: 2 us of every call.
    _DIFFERENTIABLE[name] = super(torch.autograd.Function, function).apply
    _TRANSFORMED[name] = transformable(name, run, derive, prepare, instead)
