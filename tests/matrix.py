"""The error-budget tests under several BLAS kernels, instruction sets and thread counts: ``python -m tests.matrix``.

What a library picks follows from the processor; here it is told to pick something else, so that nobody's processor is a
surprise. Settings that this processor cannot run are named and left out. Two processes at a time, one thread of control
each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# numpy's BLAS, which Triton's interpreter computes with; torch's kernels; ours; threads. The last is the host's own.
VARIABLES = ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "SADCL_CPU_ISA", "OMP_NUM_THREADS")
SETTINGS = (
    ("SkylakeX", "avx2", "avx512", "1"),
    ("Haswell", "default", "avx2", "2"),
    ("Zen", "avx2", "portable", "3"),
    ("", "", "", "1"),
)
# What a value needs of the processor, in the names of ours.
NEEDS = {"SkylakeX": "avx512", "Haswell": "avx2", "Zen": "avx2", "avx2": "avx2", "avx512": "avx512"}


def supported() -> list[str]:
    """Instruction sets that this processor has; none without the extension."""
    try:
        from sadcl import _C
    except ImportError:
        return []
    return _C.supported_isas()


def rows(isas: list[str]) -> list[dict[str, str]]:
    """The settings that this processor can run, without those that become another's by what is left out."""
    found: list[dict[str, str]] = []
    for values in SETTINGS:
        row = {}
        for name, value in zip(VARIABLES, values, strict=True):
            if NEEDS.get(value, "portable") in (*isas, "portable") and (name != "SADCL_CPU_ISA" or isas):
                row[name] = value
            else:
                print(f"left out: {name}={value}; this processor and the extension have {isas or 'none'}")
        row = {name: value for name, value in row.items() if value}
        if row not in found:
            found.append(row)
    return found


def run(row: dict[str, str], arguments: list[str]) -> tuple[bool, str]:
    """The tests under one setting: of the ops, then of the kernels under Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | row
    said, good = "", True
    for folder, more in (("ops", {}), ("interpreted", {"TRITON_INTERPRET": "1"})):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "budget", "-p", "no:cacheprovider", f"tests/{folder}"]
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False
        )
        # 5: no test was collected, as where Triton is not installed.
        fine = done.returncode in (0, 5)
        good &= fine
        said += f"  {folder}: {done.stdout.strip().splitlines()[-1]}\n"
        said += "" if fine else done.stdout[-6000:] + done.stderr[-2000:]
    return good, said


def main(arguments: list[str]) -> int:
    chosen = rows(supported())
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for row, (good, said) in zip(chosen, pool.map(lambda row: run(row, arguments), chosen), strict=True):
            print(f"{'ok' if good else 'FAILED'}: {' '.join(f'{k}={v}' for k, v in row.items())}\n{said}", flush=True)
            failed += not good
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
