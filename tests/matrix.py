"""The error-budget tests under several BLAS kernels and instruction sets: ``python -m tests.matrix``.

What a library picks follows from the processor; here it is told to pick something else, so that nobody's processor is a
surprise (what it picks by itself is `make test`'s). One instruction set a setting, the published sizes under the first
alone. Settings that this processor cannot run are named and left out. Two processes at a time, one thread each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# numpy's BLAS, which Triton's interpreter computes with; torch's kernels; ours.
VARIABLES = ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "SADCL_CPU_ISA")
SETTINGS = (("SkylakeX", "avx2", "avx512"), ("Haswell", "default", "avx2"), ("Zen", "avx2", "portable"))
# Triton's interpreter, the slower one, first.
FOLDERS = {"interpreted": {"TRITON_INTERPRET": "1"}, "ops": {}}
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
        if row not in found:
            found.append(row)
    return found


def run(row: dict[str, str], folder: str, published: bool, arguments: list[str]) -> tuple[bool, str]:
    """Whether the tests of a folder pass under one setting, and what is to be said of them."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= row | FOLDERS[folder] | {"OMP_NUM_THREADS": "1"}
    wanted = "budget" if published else "budget and not published"
    command = [sys.executable, "-m", "pytest", "-q", "-m", wanted, "-p", "no:cacheprovider", f"tests/{folder}"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    good = done.returncode in (0, 5)  # 5: no test was collected, as where Triton is not installed
    setting = " ".join(f"{name}={value}" for name, value in row.items())
    said = f"{'ok' if good else 'FAILED'}: {folder}, {setting} ({time.monotonic() - start:.0f} s)"
    return good, said if good else said + "\n" + done.stdout[-6000:] + done.stderr[-2000:]


def main(arguments: list[str]) -> int:
    chosen = rows(supported())
    jobs = [(row, folder, row is chosen[0], arguments) for folder in FOLDERS for row in chosen]
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for good, said in pool.map(lambda job: run(*job), jobs):
            print(said, flush=True)
            failed += not good
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
