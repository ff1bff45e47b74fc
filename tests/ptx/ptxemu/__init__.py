"""Execute a PTX kernel for sm_80 on the CPU, and say what it does that it must not: see README.md."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .native import OPERANDS, library, opcodes
from .parse import Instruction, Program, UnknownOpcode, parse

__all__ = ["Fault", "Kernel", "Result", "UnknownOpcode", "opcodes", "parse", "run"]

_INSTRUCTION = np.dtype([("head", np.int32, 6), ("operand", np.int32, OPERANDS), ("number", np.int64, 4)])
_REGION = np.dtype([("base", np.uint64), ("size", np.uint64), ("known", np.uint64)])
_DIMENSIONS = 8
_VIEW = np.dtype([("region", np.uint64), ("base", np.uint64), ("item", np.uint64), ("dimensions", np.uint64),
                  ("sizes", np.uint64, _DIMENSIONS), ("strides", np.uint64, _DIMENSIONS)])  # fmt: skip
LIMIT = 10**9


class Fault(RuntimeError):
    """What a kernel did that it must not do.

    Attributes:
        kind: ``bounds``, ``misaligned``, ``uninitialised``, ``pending`` (a copy not waited for), ``race``,
            ``deadlock``, ``divergence`` or ``limit``.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@dataclass
class Result:
    """What a launch did: how many lanes executed each instruction."""

    code: list[Instruction]
    hits: np.ndarray = field(repr=False)

    @property
    def coverage(self) -> float:
        """Share of the instructions that some lane executed."""
        return float((self.hits > 0).mean())


class Kernel:
    """A kernel that is launched several times: ``Kernel(ptx)(grid, args)``, arguments as for :func:`run`."""

    def __init__(self, ptx: str | Program) -> None:
        self.program = program = parse(ptx) if isinstance(ptx, str) else ptx
        code = np.zeros(len(program.code), _INSTRUCTION)
        for row, instruction in zip(code, program.code, strict=True):
            count = len(instruction.operands)
            row["head"] = (instruction.opcode, instruction.guard, instruction.negated, instruction.line, count,
                           instruction.results)  # fmt: skip
            row["operand"][:count] = instruction.operands
            row["number"][: len(instruction.numbers)] = instruction.numbers
        widths = np.array(program.widths, np.uint32)
        ids = np.array(list(program.constants), np.uint32)
        values = np.array(list(program.constants.values()), np.uint64)
        special = np.array(program.special, np.int32)
        self._library = library()
        self._machine = ctypes.c_void_p(
            self._library.ptx_program(
                _at(code),
                len(code),
                _at(widths),
                len(widths),
                _at(ids),
                _at(values),
                len(ids),
                _at(special),
                program.threads,
            )
        )

    def __del__(self) -> None:
        if hasattr(self, "_machine"):
            self._library.ptx_free(self._machine)

    def __call__(
        self,
        grid: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared: int = 0,
        order: int = 0,
        uninitialised: Iterable[Any] = (),
        approximation: float = 1.0,
        seed: int = 0,
        limit: int = LIMIT,
        strict_warps: bool = False,
        resident: int = 0,
    ) -> Result:
        """Launch, see :func:`run`."""
        if len(args) != len(self.program.parameters):
            raise ValueError(f"args: expected {len(self.program.parameters)}, one a parameter, got {len(args)}")
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        dimensions = np.array([*sizes, 1, 1][:3], np.uint32)
        memory = _Memory(list(uninitialised))
        size = max((offset + bytes_ for offset, bytes_ in self.program.parameters), default=0)
        parameters = np.zeros(size, np.uint8)
        for (offset, width), value in zip(self.program.parameters, args, strict=True):
            parameters[offset : offset + width] = memory.bits_of(value, width)
        regions, views = memory.regions()
        hits = np.zeros(len(self.program.code), np.uint64)
        answer = self._library.ptx_launch(
            self._machine, _at(dimensions), _at(parameters), len(parameters), _at(regions), len(regions), _at(views),
            len(views), shared, ctypes.c_uint64(order), ctypes.c_uint64(limit), ctypes.c_double(approximation),
            ctypes.c_uint64(seed), int(strict_warps), resident, _at(hits),
        )  # fmt: skip
        if answer is not None:
            raise Fault(*answer.decode().split("\n", 1))
        return Result(self.program.code, hits)


def run(ptx: str | Program, grid: int | Sequence[int], args: Sequence[Any], **options: Any) -> Result:
    """Execute a kernel.

    Args:
        ptx: text with one kernel.
        grid: blocks, up to three numbers.
        args: one a parameter: numpy arrays and CPU tensors (of any strides: bytes between their elements are out of
            bounds), ints, floats, None for a null pointer, tuples of ints for structs of 64-bit integers that are
            passed by value. Arrays are written in place.
        shared: bytes of dynamic shared memory.
        order: of warps between barriers, and of blocks: 0 ascending, 1 descending, others draw one.
        uninitialised: those of the arrays that hold no values yet; or pairs of an array and a mask of its bytes
            (uint8, 1 where there is a value, of its whole span), which is kept up to date.
        approximation: the share of their documented error that approximate instructions make, drawn by ``seed``.
        limit: of warps' instructions, after which the launch is taken to hang.
        strict_warps: whether lanes of one warp race too, unless ``bar.warp.sync`` stands between.
        resident: blocks that run at once, where the kernel has atomic operations or the like; 0: all.

    Raises:
        Fault: the kernel reads, writes, or waits as it must not; says where.
        UnknownOpcode: names the opcode.
    """
    return Kernel(ptx)(grid, args, **options)


class _Memory:
    """The arrays of a launch. Those that overlap are one region, in which the elements of any may be touched."""

    def __init__(self, uninitialised: list[Any]) -> None:
        self.arrays: list[_Array] = []
        self.fresh: list[tuple[_Array, np.ndarray]] = []
        self.kept: list[np.ndarray] = []
        for item in uninitialised:
            value, mask = item if isinstance(item, tuple) else (item, None)
            array = _Array.of(value)
            self.fresh.append((array, np.zeros(array.span, np.uint8) if mask is None else mask))

    def bits_of(self, value: Any, width: int) -> np.ndarray:
        """The bytes of a parameter."""
        if isinstance(value, tuple):
            return np.array(value, np.int64).view(np.uint8)
        if value is None or isinstance(value, (int, np.integer)):
            number = int(value or 0) & ((1 << 8 * width) - 1)
        elif isinstance(value, float):
            number = int.from_bytes(np.array(value, np.float32 if width == 4 else np.float64).tobytes(), "little")
        else:
            self.arrays.append(_Array.of(value))
            number = self.arrays[-1].base
        return np.frombuffer(number.to_bytes(width, "little"), np.uint8)

    def regions(self) -> tuple[np.ndarray, np.ndarray]:
        """Regions, and where the elements are in them."""
        merged: list[list[int]] = []
        views = []
        for array in sorted(self.arrays, key=lambda array: array.base):
            if array.span == 0:
                continue
            if merged and array.base < merged[-1][0] + merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], array.base + array.span - merged[-1][0])
            else:
                merged.append([array.base, array.span])
            padding = (0,) * (_DIMENSIONS - len(array.shape))
            views.append((len(merged) - 1, array.base, array.item, len(array.shape), array.shape + padding,
                          array.strides + padding))  # fmt: skip
        rows = [(base, size, self._known(base, size)) for base, size in merged]
        return np.array(rows, _REGION), np.array(views, _VIEW)

    def _known(self, base: int, size: int) -> int:
        """Where the mask of a region's bytes is, 0 where all of them hold values."""
        inside = [
            (array, mask) for array, mask in self.fresh if array.base < base + size and base < array.base + array.span
        ]
        for array, mask in inside:
            if array.base <= base and base + size <= array.base + array.span:
                self.kept.append(mask)
                return mask.ctypes.data + base - array.base
        if not inside:
            return 0
        raise ValueError("uninitialised: expected arrays that hold all of the arguments which overlap them")


@dataclass(frozen=True)
class _Array:
    """Address, bytes of an element, shape and strides in bytes, bytes from the first element to the last."""

    base: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    @classmethod
    def of(cls, value: Any) -> _Array:
        if isinstance(value, np.ndarray):
            base, item, shape, strides = value.ctypes.data, value.itemsize, value.shape, value.strides
        elif hasattr(value, "data_ptr"):
            base, item, shape = value.data_ptr(), value.element_size(), tuple(value.shape)
            strides = tuple(step * item for step in value.stride())
        else:
            raise TypeError(f"args: expected arrays, tensors, numbers or None, got {type(value).__name__}")
        if any(step < 0 for step in strides) or len(shape) > _DIMENSIONS:
            raise ValueError(f"args: expected at most {_DIMENSIONS} dimensions and no negative stride")
        span = 0 if 0 in shape else item + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        return cls(base, item, shape, strides, span)


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
