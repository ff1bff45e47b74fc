"""What to compile: the launches of a training step, and each as the runtime would specialise it.

The launchers run on meta tensors while ``sadcl.kernels._launch.recording`` writes down what they would launch; nothing
is executed, and no device is needed.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, PUBLISHED, Maker, Size

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
SMALL = ("sm_75", "sm_86", "sm_89")  # little shared memory
# What a table's rows are compiled for.
_OF_TABLE = {
    "mlc": {"_pair_sweep_kernel", "_gradient_kernel"},
    "mlc_msc": {"_pair_sweep_kernel", "_gradient_kernel"},
    "sscl": {"_sweep_kernel"},
    "sscl_backward": {"_gradient_kernel"},
    "label_attention_core": {"_attend_kernel", "_weight_kernel"},
    "label_attention_core_backward": {"_score_gradient_kernel"},
    "label_attention_core_product": {"_query_gradient_kernel", "_key_gradient_kernel"},
}
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one part: plain data, so that another process can."""

    arch: str
    operands: str
    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    max_registers: int | None

    @property
    def kernel(self) -> Any:
        """The kernel's function."""
        return getattr(importlib.import_module(self.module), self.name)

    def version(self) -> tuple[object, ...]:
        """What tells the compiled versions of the kernel apart on one part."""
        options = (self.num_warps, self.num_stages, self.max_registers)
        return options, repr((self.signature, self.constants, self.attributes))

    def fingerprint(self) -> str:
        """What a compilation depends on."""
        import triton

        parts = (self.arch, self.kernel.cache_key, triton.__version__, *self.version())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def job_of(launch: Any, arch: str, operands: str) -> Job:
    """A launch with its argument types, constants and alignments, as the runtime would specialise them."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], special: bool) -> Any:
        if isinstance(value, tuple):
            parts = [describe(part, (*path, index), special) for index, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if value is None or (value == 1 and special):
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and special:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    names = launch.kernel.arg_names
    for parameter, value in zip(launch.kernel.params, launch.args, strict=False):
        signature[parameter.name] = describe(value, (parameter.num,), not parameter.do_not_specialize)
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return Job(arch, operands, launch.kernel.__module__, launch.name, signature, constants, attributes,
               launch.num_warps, launch.num_stages, launch.registers)  # fmt: skip


def record(arch: str, dtype: torch.dtype, size: Size = PUBLISHED) -> list[Any]:
    """What a training step of this size launches with operands of ``dtype``: every op on its examples."""
    from sadcl.kernels import _launch

    with _launch.recording(_launch.PARTS[arch]) as launches:
        for name, op in sorted((name, op) for name, op in OPS.items() if "triton" in op.backends):
            sizes = (size, replace(size, b=4096)) if name == "compact" else (size,)
            for x in (x for size in sizes for x in EXAMPLES[name](Maker(size, dtype, "meta"))):
                out = op.run(x, "triton")
                if op.derivative is not None:
                    op.derivative.run(op.derivative.pack(out[: op.results], x, out), "triton")
    return launches


def operands_of(arch: str, everything: bool) -> dict[str, tuple[torch.dtype, str]]:
    """Operand names of a part, with dtype and precision. sm_75 has no bfloat16 and no tf32, AMD's tf32x3 is ieee."""
    half = {"fp16": (torch.float16, "ieee")}
    brain = {} if arch == "sm_75" else {"bf16": (torch.bfloat16, "ieee")}
    found = (brain or half) | {"fp32 ieee": (torch.float32, "ieee")}
    if not everything:
        return found
    names = () if arch == "sm_75" else ("tf32",) if arch.startswith("gfx") else ("tf32", "tf32x3")
    return found | half | {f"fp32 {name}": (torch.float32, name) for name in names} | {"fp64": (torch.float64, "ieee")}


def jobs_of(arch: str, everything: bool) -> Iterator[Job]:
    """What to compile for a part."""
    from sadcl.kernels import _tiles
    from sadcl.kernels._launch import PARTS

    for operands, (dtype, precision) in operands_of(arch, everything).items():
        with mock.patch.dict("os.environ", {"SADCL_TRITON_PRECISION": precision}):
            launches = record(arch, dtype)
            kind, choose = _tiles.kind_of(dtype, precision), _tiles.candidates
            for op in _tiles.TABLES if everything else ():
                for tile in _tiles.candidates(op, PARTS[arch], kind)[1:]:
                    only = lambda asked, *rest, op=op, tile=tile: (tile,) if asked == op else choose(asked, *rest)  # noqa: E731
                    with mock.patch.object(_tiles, "candidates", only):
                        launches += [launch for launch in record(arch, dtype) if launch.name in _OF_TABLE[op]]
        for launch in launches:
            free = not any(tensor.is_floating_point() for tensor in _tensors(launch.args))
            yield job_of(launch, arch, "any" if free else operands)


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value
