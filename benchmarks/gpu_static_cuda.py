"""What NVRTC and the assembler say of every CUDA C++ kernel, on any machine.

``python -m benchmarks.gpu_static_cuda`` compiles what a training step of the published shape launches for sm_80, sm_90,
sm_100 and sm_120 and writes docs/gpu_static_cuda.md; ``--check`` takes bfloat16 and float32 alone and writes nothing.
Nothing is executed. Registers and spills are read from the very binary that the driver would load, by ``cuobjdump`` of
the Triton wheel. The exit status is 1 if a kernel spills, does not fit, or has no matrix instruction where its operands
have one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch

from sadcl.cuda import _launch, _nvrtc
from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, PUBLISHED, Maker

from .gpu_static import _MATRIX, DOCS, nvidia_usage, programs_on_a_processor

PRODUCTS = ("sscl_forward", "sscl_backward", "mlc_forward", "mlc_backward")
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Result:
    """One kernel compiled for one part."""

    arch: str
    kernel: str
    threads: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    matrix: str
    faults: tuple[str, ...]

    def row(self) -> str:
        """A line of the report's table."""
        cells = (self.arch, f"`{self.kernel}`", self.threads, self.registers, self.spilled, self.shared, self.blocks)
        return "| " + " | ".join(map(str, (*cells, self.matrix or "-"))) + " |"


def launches_of(arch: str, kinds: tuple[str, ...]) -> list[_launch.Launch]:
    """One launch a program: every op on its examples, forward and backward, in the kinds of operands that it takes."""
    found: dict[tuple[str, int], _launch.Launch] = {}
    with _launch.recording(_launch.PARTS[arch]) as launches:
        for dtype in (KINDS[kind] for kind in kinds):
            for name, op in sorted((name, op) for name, op in OPS.items() if "cuda" in op.backends):
                for x in EXAMPLES[name](Maker(PUBLISHED, dtype, "meta")):
                    try:
                        out = op.run(x, "cuda")
                    except ValueError:  # an op without float64, or without a weighting
                        assert dtype == torch.float64 or name == "mlc", name
                        continue
                    if op.derivative is not None:
                        op.derivative.run(op.derivative.pack(out[: op.results], x, out), "cuda")
    for launch in launches:
        found.setdefault((launch.program.label, launch.shared), launch)
    return list(found.values())


def examine(launch: _launch.Launch, arch: str) -> Result:
    """Compile for a part and read off what it needs."""
    cubin = launch.program.compiled(arch)
    registers, spilled = nvidia_usage(cubin)
    matrix = ""
    if launch.name in PRODUCTS:
        matrix = ", ".join(sorted(set(_MATRIX.findall(launch.program.compiled(f"compute_{arch[3:]}").decode()))))
    faults = []
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if launch.shared > _launch.PARTS[arch].shared_bytes:
        faults.append(f"needs {launch.shared} bytes of shared memory")
    narrow = any(kind in launch.program.defines.values() for kind in ("bf16", "f16"))
    if launch.name in PRODUCTS and narrow != bool(matrix):
        faults.append("has no matrix instruction" if narrow else "rounds float32 operands")
    blocks = programs_on_a_processor(arch, registers, launch.shared, launch.threads // 32)
    if blocks == 0:
        faults.append("does not fit")
    return Result(arch, launch.program.label, launch.threads, registers, spilled, launch.shared, blocks, matrix,
                  tuple(faults))  # fmt: skip


def write_report(results: list[Result]) -> None:
    """Write docs/gpu_static_cuda.md."""
    major, minor = _nvrtc.version()
    lines = [
        "# CUDA C++ kernels, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.gpu_static_cuda` with NVRTC {major}.{minor} at the COCO shape (B=32, V=2,",
        "C=80, D=1024, E=2048). Compiled here, executed as sm_80's PTX on a CPU by tests/ptx, timed by nobody.",
        "Registers are of a thread, spills are bytes to memory, `fit` is how many blocks a multiprocessor holds.",
        "",
        "| part | kernel and defines | threads | registers | spills | shared | fit | matrix instruction |",
        "|---|---|---|---|---|---|---|---|",
        *(result.row() for result in results),
        "",
    ]
    (DOCS / "gpu_static_cuda.md").write_text("\n".join(lines))


def main() -> int:
    """Compile, report, and say whether anything is at fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=_launch.PARTS, action="append", help="one part (repeatable); no report")
    parser.add_argument("--check", action="store_true", help="write no report")
    arguments = parser.parse_args()
    kinds = ("bf16", "fp32") if arguments.check else tuple(KINDS)
    arches = arguments.arch or tuple(_launch.PARTS)
    results = [examine(launch, arch) for arch in arches for launch in launches_of(arch, kinds)]
    for result in results:
        print(result.row(), *result.faults, flush=True)
    if not arguments.check and not arguments.arch:
        write_report(results)
    faults = [f"{r.arch} {r.kernel}: {fault}" for r in results for fault in r.faults]
    print(f"{len(results)} kernels compiled, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
