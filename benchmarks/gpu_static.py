"""What the compilers say of every Triton kernel, on any machine.

``python -m benchmarks.gpu_static`` compiles the default tiles for sm_80, sm_90, sm_100 and gfx942 and writes
docs/gpu_static.md; ``--all`` every tile of the tables with every kind of operand, for the parts with little shared
memory too, and writes the summary docs/gpu_static_all.md. ``--check`` writes nothing. ``--log FILE`` keeps results, so
that a run can be resumed.

The launches of a training step of a published shape are written down (:mod:`.launches`), and each is compiled as the
runtime would specialise it, in a pool of processes; nothing is executed.

The report holds registers and spills (``cuobjdump`` of the Triton wheel on the very binary that Triton would load; the
assembly text on AMD), shared memory, how many programs fit on a processor, matrix instructions and 128-bit accesses to
global memory. The exit status is 1 if a kernel spills to memory, does not fit, or lacks a matrix instruction where the
part has one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .launches import ARCHES, SMALL, Job, jobs_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
PRODUCTS = (
    "sscl._sweep_kernel",
    "sscl._pair_maximum_kernel",
    "sscl_backward._gradient_kernel",
    "mlc._pair_sweep_kernel",
    "label_attention_core._attend_kernel",
    "label_attention_core._weight_kernel",
    "label_attention_core_backward._score_gradient_kernel",
    "label_attention_core_backward._query_gradient_kernel",
    "label_attention_core_backward._key_gradient_kernel",
)
_MATRIX = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma)")
_WIDE = re.compile(
    r"(?:ld|st)\.global\S*\.v4\.[bfu]32|(?:ld|st)\.global\S*\.v2\.[bfu]64|cp\.async\.c[ag]\.shared\.global.*0x10\b"
    r"|(?:global|buffer|flat)_(?:load|store)_dwordx4"
)
# Registers of a multiprocessor, warps that it holds, shared memory of all its programs.
_LIMITS = {
    "sm_75": (65536, 32, 64 << 10),
    "sm_80": (65536, 64, 164 << 10),
    "sm_86": (65536, 48, 100 << 10),
    "sm_89": (65536, 48, 100 << 10),
    "sm_90": (65536, 64, 228 << 10),
    "sm_100": (65536, 64, 228 << 10),
    "sm_120": (65536, 48, 100 << 10),
}


@dataclass(frozen=True)
class Result:
    """One kernel compiled for one part."""

    arch: str
    operands: str
    kernel: str
    options: str
    registers: int
    spilled: int
    shared: int
    programs: int
    matrix: str
    wide: int
    faults: tuple[str, ...]

    def row(self) -> str:
        """A line of the report's table."""
        cells = (self.arch, self.operands, f"`{self.kernel}`", self.options, self.registers, self.spilled, self.shared)
        return "| " + " | ".join(map(str, (*cells, self.programs, self.matrix or "-", self.wide))) + " |"


def compile_job(job: Job) -> Any:
    """Compile a job with Triton."""
    import triton
    from sadcl.kernels._launch import FP_FUSION
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = job.arch.startswith("gfx")
    target = GPUTarget("hip", job.arch, 64) if amd else GPUTarget("cuda", int(job.arch[3:]), 32)
    source = ASTSource(job.kernel, signature=job.signature, constexprs=job.constants, attrs=job.attributes)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": FP_FUSION}
    if job.max_registers is not None and not amd:
        options["maxnreg"] = job.max_registers
    return triton.compile(source, target=target, options=options)


def nvidia_usage(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack that are used: what is spilled to memory, or kept there.

    LLVM may reserve bytes that nothing is left to use: of Triton 3.9 the two-way gradient has four.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cubin")
        source.write_bytes(binary)
        shown = _cuobjdump("--dump-resource-usage", source)
        used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
        if len(used) != 1:
            raise RuntimeError(f"cuobjdump: {shown}")
        registers, stack, local = map(int, used[0])
        if stack + local and not re.search(r"\b(LDL|STL)\b", _cuobjdump("--dump-sass", source)):
            return registers, 0
    return registers, stack + local


def _cuobjdump(option: str, source: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), option, str(source)], capture_output=True, text=True)
    return done.stdout + done.stderr


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a lane, and bytes of scratch memory: what is spilled to memory, or kept there."""
    value = lambda name: int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])  # noqa: E731
    return value("vgpr_count") + value("agpr_count"), value("private_segment_fixed_size") + value("vgpr_spill_count")


def programs_on_a_processor(arch: str, registers: int, shared: int, warps: int) -> int:
    """How many programs fit, by registers, warps and shared memory."""
    if arch.startswith("gfx"):
        waves = min(8, 512 // max(8 * -(-registers // 8), 1))  # of each of four SIMDs
        return min(4 * waves // warps, (64 << 10) // max(shared, 1))
    all_registers, all_warps, all_shared = _LIMITS[arch]
    of_a_warp = 256 * -(-registers * 32 // 256)
    reserved = 0 if arch == "sm_75" else 1024  # by the driver, of every program's shared memory
    return min(all_registers // (of_a_warp * warps), all_warps // warps, all_shared // max(shared + reserved, 1))


def has_matrix_units(arch: str, operands: str) -> bool:
    """Whether products of these operands must use them: sm_75's are not in Triton, ``ieee`` and float64 are plain."""
    return arch.startswith("gfx") or (arch != "sm_75" and not operands.startswith(("fp32 ieee", "fp64")))


def examine(job: Job) -> Result:
    """Compile one job and read off what it needs."""
    from sadcl.kernels._launch import PARTS

    arch, operands = job.arch, job.operands
    kernel = f"{job.module.rsplit('.', 1)[1]}.{job.name}"
    compiled = compile_job(job)
    amd = arch.startswith("gfx")
    text = compiled.asm["amdgcn" if amd else "ptx"]
    registers, spilled = amd_usage(text) if amd else nvidia_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    matrix = ", ".join(sorted(set(_MATRIX.findall(text))))
    names = job.kernel.arg_names
    constants = {names[path[0]]: value for path, value in job.constants.items() if len(path) == 1}
    faults = []
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if shared > PARTS[arch].shared_bytes:
        faults.append(f"needs {shared} bytes of shared memory")
    multiplies = kernel in PRODUCTS and constants.get("SCORES", True)
    if multiplies and not matrix and has_matrix_units(arch, operands):
        faults.append("has no matrix instruction")
    if matrix and not amd and operands.startswith("fp32 ieee"):
        faults.append("rounds ieee operands to tf32")
    sizes = [
        f"{name[6:].lower()}={constants[name]}" for name in names if name.startswith("BLOCK_") and name in constants
    ]
    options = " ".join([*sizes, f"warps={job.num_warps}", f"stages={job.num_stages}"])
    programs = programs_on_a_processor(arch, registers, shared, job.num_warps)
    wide = len(_WIDE.findall(text))
    return Result(arch, operands, kernel, options, registers, spilled, shared, programs, matrix, wide, tuple(faults))


def write_report(results: list[Result]) -> None:
    """Write docs/gpu_static.md."""
    import triton

    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.gpu_static` with Triton {triton.__version__} at the COCO shape (B=32, V=2,",
        "C=80, D=1024, E=2048, L=196, 4 heads). What `--all` compiles: [gpu_static_all.md](gpu_static_all.md).",
        "Compiled, not executed: nobody has timed these kernels. Registers are of a thread (AMD: vector registers of",
        "a lane), spills are bytes to memory (AMD: scratch memory), `fit` is how many programs a multiprocessor holds",
        "at once, `wide` counts 128-bit global loads and stores in the text. fp32 `ieee` products are FFMA on NVIDIA",
        "parts, by definition. Compiled with other versions (`make tritons`): [benchmarks.md](benchmarks.md#gpu).",
        "",
        "| part | operands | kernel | tile | registers | spills | shared | fit | matrix instruction | wide |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(result.row() for result in results),
        "",
    ]
    (DOCS / "gpu_static.md").write_text("\n".join(lines))


def write_summary(results: list[Result]) -> None:
    """Write docs/gpu_static_all.md: a line for each part and kind of operand, and what is at fault."""
    import triton
    from sadcl.kernels._launch import PARTS

    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.arch, result.operands), []).append(result)
    rows = []
    for (arch, operands), group in groups.items():
        products = [r for r in group if r.kernel in PRODUCTS]
        matrix = f"{sum(bool(r.matrix) for r in products)} of {len(products)}" if products else "-"
        worst = [max(getattr(r, name) for r in group) for name in ("registers", "spilled", "shared")]
        fewest = min(r.programs for r in group)
        cells = (arch, operands, len(group), *worst, PARTS[arch].shared_bytes, fewest, matrix)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    lines = [
        "# Every shipped tile, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.gpu_static --all` with Triton {triton.__version__}: {len(results)} kernels, of",
        "every row of the tile tables and every kind of operand. Compiled, not executed.",
        "`registers`, `spills` and `shared` are the largest of the group, `limit` is the part's shared memory, `fit`",
        "the fewest programs on a multiprocessor, `matrix` how many kernels with products use matrix instructions",
        "(Triton has none for sm_75; fp32 `ieee` is plain on NVIDIA parts, fp64 on sm_75, sm_86 and sm_89).",
        "",
        "| part | operands | kernels | registers | spills | shared | limit | fit | matrix |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    faults = [f"- {line}" for line in faults_of(results)]
    lines += ["At fault:", "", *faults, ""] if faults else ["No kernel spills, and all fit.", ""]
    (DOCS / "gpu_static_all.md").write_text("\n".join(lines))


def faults_of(results: list[Result]) -> list[str]:
    """A line for each fault."""
    return [f"{r.arch} {r.operands} {r.kernel} {r.options}: {fault}" for r in results for fault in r.faults]


def examine_all(jobs: dict[str, Job], workers: int) -> Iterator[tuple[str, Result]]:
    """Results by fingerprint, in the jobs' order."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from zip(jobs, pool.map(examine, jobs.values()), strict=True)


def main() -> int:
    """Compile, report, and say whether anything is at fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every part, tile and operand")
    parser.add_argument("--arch", choices=ARCHES + SMALL, action="append", help="one part (repeatable); no report")
    parser.add_argument("--check", action="store_true", help="write no report")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a processor)")
    parser.add_argument("--log", type=Path, help="file of results: what it holds is not compiled again")
    arguments = parser.parse_args()
    known: dict[str, Result] = {}
    if arguments.log and arguments.log.exists():
        for line in arguments.log.read_text().splitlines():
            key, entry = json.loads(line)
            known[key] = Result(**{**entry, "faults": tuple(entry["faults"])})
    jobs: dict[str, Job] = {}
    for arch in arguments.arch or (ARCHES + SMALL if arguments.all else ARCHES):
        for job in jobs_of(arch, arguments.all):
            jobs.setdefault(job.fingerprint(), job)
    for key, result in examine_all({key: job for key, job in jobs.items() if key not in known}, arguments.jobs):
        known[key] = result
        print(result.row(), *result.faults, flush=True)
        if arguments.log:
            with arguments.log.open("a") as log:
                log.write(json.dumps([key, asdict(result)]) + "\n")
    results = {key: known[key] for key in jobs}
    if not arguments.check and not arguments.arch:
        (write_summary if arguments.all else write_report)(list(results.values()))
    faults = faults_of(list(results.values()))
    print(f"{len(results)} kernels compiled, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
